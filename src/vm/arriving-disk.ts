/**
 * The disk of a VM that runs here before its disk is here, as two overlays:
 *
 *   disk.qcow2   the VM's own, into which goes what it writes here
 *   below.qcow2  what it had written where it came from, as far as that is here
 *   the image
 *
 * As long as something is missing below, QEMU reads what lies under `disk.qcow2` from the daemon (NBD over a unix socket),
 * which fetches it; it never writes there. When all of it is here, QEMU is turned to `below.qcow2` itself, and takes that
 * into its own overlay (`block-stream`): then the disk is like any other. In its file the overlay stands on `below.qcow2`
 * from the beginning, so that once that is whole the disk is right whatever ends in between.
 *
 * `below.qcow2` is there as long as the disk is not like any other.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { access, rm } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { AppError } from '../model/errors.ts';
import { delay, type QemuOptions, type QmpConnection } from '../qmp/index.ts';
import { belowExport, nodeNames, ownDiskNode } from './argv.ts';
import { type CreateDiskOptions, createDisk, whole } from './disks.ts';
import { type ImageFormat, readQcow2Header } from './image-check.ts';
import { run } from './run.ts';

export const belowFile = (directory: string): string => join(directory, 'below.qcow2');
/** Where the daemon listens for QEMU. */
export const belowSocket = (directory: string): string => join(directory, 'below.sock');
const writerSocket = (directory: string): string => join(directory, 'lower.sock');

const streamJob = 'arrive-disk';
const pollMs = 50;
const startTimeoutMs = 10_000;
const offlineTimeoutMs = 60 * 60_000;

/** Makes both overlays; `file` is that of the VM. What it throws is as for `createDisk`. */
export async function makeArrivingDisk(options: CreateDiskOptions): Promise<void> {
  const { file, sizeBytes, signal } = options;
  const below = belowFile(dirname(file));
  await createDisk({ ...options, file: below });
  await whole(file, 'Create disk', 0, async (making) => {
    const overlay = ['-u', '-f', 'qcow2', '-F', 'qcow2', '-b', './below.qcow2', making, String(sizeBytes)];
    await run('qemu-img', ['create', '-q', ...overlay], { signal });
  });
}

/** Throws where that cannot be seen, for a disk that is not arriving is not asked for any more. */
export async function isArriving(directory: string): Promise<boolean> {
  return access(belowFile(directory)).then(
    () => true,
    (error: NodeJS.ErrnoException) => {
      if (error.code === 'ENOENT') return false;
      throw error;
    },
  );
}

/** A server that writes what arrives; it ends by itself when its client leaves, or this daemon ends. */
export interface BelowWriter extends AsyncDisposable {
  socketPath: string;
}

/** Tries until nobody else has the file: the one of an earlier daemon may just be about to end. */
export async function writeBelow(directory: string, signal: AbortSignal): Promise<BelowWriter> {
  const deadline = performance.now() + startTimeoutMs;
  for (;;) {
    try {
      return await startWriter(directory, signal);
    } catch (error) {
      if (signal.aborted || performance.now() > deadline) throw error;
      await delay(4 * pollMs, signal);
    }
  }
}

async function startWriter(directory: string, signal: AbortSignal): Promise<BelowWriter> {
  const socketPath = writerSocket(directory);
  await rm(socketPath, { force: true });
  const options = ['--format=qcow2', `--export-name=${belowExport}`, '--cache=writeback', '--discard=unmap'];
  const child = spawn(
    'setpriv',
    ['--pdeathsig', 'TERM', 'qemu-nbd', ...options, `--socket=${socketPath}`, belowFile(directory)],
    { stdio: ['ignore', 'ignore', 'pipe'], env: { PATH: process.env.PATH, LC_ALL: 'C' } },
  );
  let said = '';
  child.stderr!.setEncoding('utf8').on('data', (text: string) => {
    said = (said + text).slice(-1000);
  });
  const ended = endOf(child);
  for (;;) {
    if (await isThere(socketPath)) break;
    const how = await Promise.race([ended, delay(pollMs, signal)]).catch((error) => {
      child.kill();
      throw error;
    });
    if (how !== undefined)
      throw new AppError('qemu_failed', `qemu-nbd ended at its start (${how}): ${said.trim()}`, {
        output: said,
      });
  }
  return {
    socketPath,
    async [Symbol.asyncDispose]() {
      // It has written everything when its client has left; one that hangs is ended.
      const late = setTimeout(() => child.kill('SIGKILL'), startTimeoutMs);
      await ended;
      clearTimeout(late);
      await rm(socketPath, { force: true });
    },
  };
}

async function endOf(child: ChildProcess): Promise<string> {
  const [code, signal] = await once(child, 'exit').catch((error: Error) => [error.message, undefined]);
  return signal ? `signal ${signal}` : `exit code ${code}`;
}

const isThere = (path: string): Promise<boolean> =>
  access(path).then(
    () => true,
    () => false,
  );

/**
 * Below everything is here, and nobody writes it any more: the disk becomes like any other while the VM runs, or stands
 * still. May be repeated after it was broken off. Throws `qemu_failed` for what QEMU cannot do.
 */
export async function settleArrivedDisk(
  qmp: QmpConnection,
  disk: { file: string; imageFile: string; imageFormat: ImageFormat },
  signal: AbortSignal,
): Promise<void> {
  const { file, imageFile, imageFormat } = disk;
  const { below, image, source } = nodeNames;
  const lower = belowFile(dirname(file));
  const { backing } = await readQcow2Header(lower);
  if (!backing) throw new AppError('image_corrupt', `Settle disk ${file}: ${lower} stands on no image`);
  const isStreaming = async () =>
    (await qmp.execute('query-block-jobs')).some(({ device }) => device === streamJob);
  if (!(await isStreaming()) && (await standsOnBelow(file))) {
    await addNode(qmp, image, {
      driver: imageFormat,
      'read-only': true,
      file: { driver: 'file', filename: imageFile, 'read-only': true },
    });
    await addNode(qmp, below, {
      driver: 'qcow2',
      'read-only': true,
      file: { driver: 'file', filename: lower, 'read-only': true },
      backing: image,
    });
    await qmp.execute('blockdev-reopen', { options: [{ ...ownDiskNode, backing: below }] });
    await qmp.execute('block-stream', {
      'job-id': streamJob,
      device: nodeNames.disk,
      'base-node': image,
      'backing-file': backing.file,
    });
  }
  while (await isStreaming()) await delay(pollMs, signal);
  if (await standsOnBelow(file))
    throw new AppError('qemu_failed', `QEMU did not take ${lower} into the disk of the VM`, { output: '' });
  for (const node of [source, below]) await removeNode(qmp, node);
  await forgetBelow(file);
}

/** As `settleArrivedDisk`, of a VM that does not run. */
export async function settleRestingDisk(file: string, signal: AbortSignal): Promise<void> {
  const { backing } = await readQcow2Header(belowFile(dirname(file)));
  if (!backing) throw new AppError('image_corrupt', `Settle disk ${file}: below it is no image`);
  const { file: image, format = 'raw' } = backing;
  if (await standsOnBelow(file))
    await run('qemu-img', ['rebase', '-q', '-f', 'qcow2', '-F', format, '-b', image, file], {
      signal,
      timeoutMs: offlineTimeoutMs,
    });
  await forgetBelow(file);
}

async function forgetBelow(file: string): Promise<void> {
  const directory = dirname(file);
  await rm(belowSocket(directory), { force: true });
  await rm(belowFile(directory), { force: true });
}

const standsOnBelow = async (file: string): Promise<boolean> =>
  (await readQcow2Header(file)).backing?.file === './below.qcow2';

/** One that is there already was made before this was broken off. */
async function addNode(
  qmp: QmpConnection,
  name: string,
  options: QemuOptions & { driver: string },
): Promise<void> {
  if (await hasNode(qmp, name)) return;
  await qmp.execute('blockdev-add', { ...options, 'node-name': name });
}

async function removeNode(qmp: QmpConnection, name: string): Promise<void> {
  if (await hasNode(qmp, name)) await qmp.execute('blockdev-del', { 'node-name': name });
}

async function hasNode(qmp: QmpConnection, name: string): Promise<boolean> {
  const nodes = await qmp.execute('query-named-block-nodes', { flat: true });
  return nodes.some((node) => node['node-name'] === name);
}

export { belowExport };
