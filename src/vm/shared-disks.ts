/**
 * Disks on storage that several cloudlets have. Each is a whole qcow2, without a base image: wherever the storage is,
 * the disk can be opened, and nothing else has to be there. A disk is named by its VM's id, which is unique, so that
 * cloudlets share one storage without asking each other.
 *
 * On a storage by URL a file cannot be removed, since QEMU's tools have no word for that: it is emptied to 0 bytes.
 */
import { stat } from 'node:fs/promises';
import { join } from 'node:path';
import { AppError } from '../model/errors.ts';
import type { Uuid } from '../model/ids.ts';
import type { Storage } from '../model/vm.ts';
import { isRemote } from './disk-node.ts';
import { deleteDisk, diskUsage, requireSize, type WholeFileOptions, whole } from './disks.ts';
import type { ImageFormat } from './image-check.ts';
import { CommandFailed, run } from './run.ts';
import { requireSpace } from './space.ts';

const action = 'Create disk on shared storage';
const copyTimeoutMs = 60 * 60_000;
/** A server that does not answer must not hold up who only asks. */
const askTimeoutMs = 10_000;

/** Path or URL of a VM's disk, whether it is there or not. */
export const sharedDisk = (storage: Storage, vmId: Uuid): string =>
  'path' in storage
    ? join(storage.path, `viper-${vmId}.qcow2`)
    : `${storage.url.replace(/\/+$/, '')}/viper-${vmId}.qcow2`;

export interface MakeSharedDiskOptions extends WholeFileOptions {
  /** What it holds at first: an image, or another disk at rest with all that is below it. */
  from: { file: string; format: ImageFormat; virtualBytes: number };
  /** Path or URL. */
  to: string;
  /** At least that of `from`. */
  sizeBytes: number;
}

/**
 * Makes the disk. Throws `invalid_request` for a size below that of its content, `insufficient_space` where a path
 * tells it, `unsupported` when the storage cannot be written to, `cancelled`. On an error the disk is not there.
 */
export async function makeSharedDisk(options: MakeSharedDiskOptions): Promise<void> {
  const { from, to, sizeBytes, reserveBytes = 0, signal } = options;
  requireSize(sizeBytes, from.virtualBytes);
  const fill = async (target: string): Promise<void> => {
    // Not the tool's default, which would leave the bytes in this host's memory when it ends.
    const convert = ['convert', '-t', 'writeback', '-f', from.format, '-O', 'qcow2', from.file, target];
    try {
      await run('qemu-img', convert, { signal, timeoutMs: copyTimeoutMs });
      if (sizeBytes > from.virtualBytes)
        await run('qemu-img', ['resize', '-q', '-f', 'qcow2', target, String(sizeBytes)], { signal });
    } catch (error) {
      throw unusable(error, to);
    }
  };
  if (isRemote(to)) {
    try {
      return await fill(to);
    } catch (error) {
      await removeSharedDisk(to).catch(() => {});
      throw error;
    }
  }
  const { size: wantedBytes } = await stat(from.file);
  await requireSpace(action, join(to, '..'), wantedBytes, reserveBytes);
  await whole(to, action, wantedBytes, fill);
}

/**
 * Whether it can be opened from here. On Gluster it is taken for granted, since gfapi takes 10 s to close a volume;
 * a QEMU that starts on it tells the truth soon enough.
 */
export async function isSharedDiskThere(source: string): Promise<boolean> {
  if (source.startsWith('gluster:')) return true;
  try {
    await usageOf(source);
    return true;
  } catch {
    return false;
  }
}

/** Bytes that the disk takes on its storage, holes left out. The VM may run. */
export async function usageOf(source: string): Promise<number> {
  if (!isRemote(source)) return (await diskUsage(source)).allocatedBytes;
  const info = ['info', '-U', '-f', 'qcow2', '--output=json', source];
  const { stdout } = await run('qemu-img', info, {
    signal: AbortSignal.timeout(2 * askTimeoutMs),
    timeoutMs: 2 * askTimeoutMs,
  });
  const { 'actual-size': bytes = 0 } = JSON.parse(stdout) as { 'actual-size'?: number };
  return bytes;
}

/** Removes the disk, or empties it where it cannot be removed. One that is gone already is no error. */
export async function removeSharedDisk(source: string): Promise<void> {
  if (!isRemote(source)) return deleteDisk(source);
  const signal = AbortSignal.timeout(6 * askTimeoutMs);
  await run('qemu-img', ['create', '-q', '-f', 'raw', source, '0'], { signal });
}

function unusable(error: unknown, source: string): unknown {
  if (!(error instanceof CommandFailed) || /No space left on device/.test(error.stderr)) return error;
  const output = error.stderr.trim().slice(-500);
  const missing = /Unknown protocol|Unknown driver/.test(output)
    ? '; QEMU has no driver for it here (qemu-block-extra)'
    : '';
  return new AppError(
    'unsupported',
    `${action}: ${source} cannot be written${missing}: ${output}`,
    { field: 'storage', value: source, output },
    { cause: error },
  );
}
