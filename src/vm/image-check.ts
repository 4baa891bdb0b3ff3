/**
 * Judges the file of an image that came from outside, before anything else opens it. The format comes from the
 * first bytes; then our own codec reads the header; only then does `qemu-img check` see the file, with little
 * memory and time, and no permission to write.
 */
import { type FileHandle, open } from 'node:fs/promises';
import { AppError } from '../model/errors.ts';
import { GiB } from '../model/units.ts';
import {
  isQcow2,
  maxHeaderBytes,
  parseQcow2Header,
  type Qcow2Header,
  requireSelfContained,
} from './qcow2.ts';
import { dataEnd } from './qcow2-extent.ts';
import { rawHeadBytes, requireRawDisk } from './raw.ts';
import { CommandFailed, run } from './run.ts';

export type ImageFormat = 'qcow2' | 'raw';

export interface ImageFacts {
  format: ImageFormat;
  fileBytes: number;
  /** Size of the disk that a guest sees. */
  virtualBytes: number;
}

const checkTimeoutMs = 10 * 60_000;
/** Refcounts of a 16 TiB image take 512 MiB; no honest image needs more than this. */
const checkMemoryBytes = 2 * GiB;

/**
 * The facts of a whole, self-contained image. Throws `image_corrupt` for anything else, `timeout` when the check
 * takes too long. `stated` is the format that the caller says it has, if any.
 */
export async function checkImage(
  file: string,
  stated: ImageFormat | undefined,
  signal: AbortSignal,
): Promise<ImageFacts> {
  await using handle = await open(file, 'r');
  const fileBytes = (await handle.stat()).size;
  const head = await readAt(handle, 0, Math.min(fileBytes, maxHeaderBytes));
  const format = isQcow2(head) ? 'qcow2' : 'raw';
  if (stated !== undefined && stated !== format && (stated === 'qcow2' || format === 'qcow2'))
    throw new AppError('image_corrupt', `Check image: the file is ${format}, wanted the stated ${stated}`);
  if (format === 'raw') {
    requireRawDisk(head.subarray(0, rawHeadBytes), fileBytes, stated === 'raw');
    return { format, fileBytes, virtualBytes: fileBytes };
  }
  const header = parseQcow2Header(head);
  requireSelfContained(header, fileBytes);
  await qemuImgCheck(file, signal);
  const end = await dataEnd(header, (offset, length) => readAt(handle, offset, length), signal);
  if (end > Math.ceil(fileBytes / 512) * 512)
    throw new AppError(
      'image_corrupt',
      `Check image: the file has ${fileBytes} bytes, wanted the ${end} that its clusters reach to; it is cut off`,
    );
  return { format, fileBytes, virtualBytes: header.virtualBytes };
}

/** The header of a qcow2 file that is already ours: an overlay, or an image of the store. */
export async function readQcow2Header(file: string): Promise<Qcow2Header> {
  await using handle = await open(file, 'r');
  return parseQcow2Header(await readAt(handle, 0, maxHeaderBytes));
}

/** Exit codes: 0 sound, 2 corrupt, 3 leaked clusters only (harmless), anything else: it could not be checked. */
async function qemuImgCheck(file: string, signal: AbortSignal): Promise<void> {
  const limits = [`--as=${checkMemoryBytes}`, '--fsize=0', '--core=0'];
  const check = ['qemu-img', 'check', '--output=json', '-f', 'qcow2', file];
  try {
    await run('prlimit', [...limits, ...check], { signal, timeoutMs: checkTimeoutMs });
  } catch (error) {
    if (!(error instanceof CommandFailed)) throw error;
    if (error.exitCode === 3) return;
    throw new AppError(
      'image_corrupt',
      `Check image: qemu-img check does not take it: ${error.stderr.trim().slice(-500)}`,
      {},
      { cause: error },
    );
  }
}

/** Up to `length` bytes from `offset`; fewer only where the file ends. */
async function readAt(handle: FileHandle, offset: number, length: number): Promise<Uint8Array> {
  const buffer = Buffer.alloc(length);
  let filled = 0;
  while (filled < length) {
    const { bytesRead } = await handle.read(buffer, filled, length - filled, offset + filled);
    if (bytesRead === 0) break;
    filled += bytesRead;
  }
  return buffer.subarray(0, filled);
}
