/**
 * Takes an image from a stream into a file: hashed as it arrives, sparse, and never more than was announced or
 * than the disk can spare. The caller removes the file when this throws.
 */
import { createHash, type Hash } from 'node:crypto';
import { constants } from 'node:fs';
import { type FileHandle, open } from 'node:fs/promises';
import { dirname } from 'node:path';
import { AppError } from '../model/errors.ts';
import { MiB } from '../model/units.ts';
import { cancellation, throwIfCancelled } from './cancel.ts';
import { explainNoSpace, requireSpace } from './space.ts';
import { SparseWriter } from './sparse-file.ts';

/** The free space is looked at again each time that this much was written. */
const spaceCheckBytes = 16 * MiB;

export interface ReceiveOptions {
  source: AsyncIterable<Uint8Array>;
  /** As announced; exactly so many bytes must come. */
  sizeBytes?: number;
  reserveBytes: number;
  signal: AbortSignal;
  onProgress?: (receivedBytes: number) => void;
  /** What is in the file already stays, and `source` is what comes after it: told here before it is read. */
  onStart?: (startBytes: number) => void;
}

export interface Received {
  digest: string;
  fileBytes: number;
}

const action = 'Import image';

/**
 * Writes `source` to the new file `file` (with `onStart`: also to one that holds its beginning), read-only and on the disk when it returns. Throws `insufficient_space`,
 * `image_corrupt` when too few or too many bytes come, `cancelled` by the signal or when the sender breaks off.
 */
export async function receive(file: string, options: ReceiveOptions): Promise<Received> {
  const { sizeBytes, reserveBytes, signal, onProgress, onStart } = options;
  const directory = dirname(file);
  await requireSpace(action, directory, sizeBytes ?? 0, reserveBytes);
  const { O_CREAT, O_RDWR } = constants;
  await using handle = await open(file, onStart ? O_CREAT | O_RDWR : 'wx', onStart ? 0o640 : 0o440);
  const hash = createHash('sha256');
  const startBytes = onStart ? await hashSoFar(handle, hash, signal) : 0;
  const writer = new SparseWriter(handle, startBytes);
  onStart?.(startBytes);
  let checkAtBytes = spaceCheckBytes;
  for await (const chunk of untilAborted(options.source, signal)) {
    if (sizeBytes !== undefined && writer.position + chunk.length > sizeBytes)
      throw wrongSize(`more than ${sizeBytes}`, sizeBytes);
    hash.update(chunk);
    try {
      await writer.write(chunk);
    } catch (error) {
      throw await explainNoSpace(error, action, directory, sizeBytes ?? writer.position + chunk.length);
    }
    if (writer.writtenBytes >= checkAtBytes) {
      await requireSpace(action, directory, 0, reserveBytes);
      checkAtBytes = writer.writtenBytes + spaceCheckBytes;
    }
    onProgress?.(writer.position);
  }
  if (sizeBytes !== undefined && writer.position !== sizeBytes)
    throw wrongSize(`${writer.position}`, sizeBytes);
  try {
    await writer.finish();
    await handle.chmod(0o440);
  } catch (error) {
    throw await explainNoSpace(error, action, directory, writer.position);
  }
  return { digest: `sha256:${hash.digest('hex')}`, fileBytes: writer.position };
}

/** Bytes that the file holds, all of them hashed. */
async function hashSoFar(handle: FileHandle, hash: Hash, signal: AbortSignal): Promise<number> {
  const buffer = Buffer.allocUnsafe(MiB);
  for (let position = 0; ; ) {
    throwIfCancelled(signal, action);
    const { bytesRead } = await handle.read(buffer, 0, buffer.length, position);
    if (bytesRead === 0) return position;
    hash.update(buffer.subarray(0, bytesRead));
    position += bytesRead;
  }
}

/** The chunks of `source`; stops waiting for the next one as soon as `signal` fires. */
async function* untilAborted(
  source: AsyncIterable<Uint8Array>,
  signal: AbortSignal,
): AsyncGenerator<Uint8Array> {
  const iterator = source[Symbol.asyncIterator]();
  try {
    for (;;) {
      const result = await nextOrAbort(iterator, signal);
      if (result.done) return;
      yield result.value;
    }
  } finally {
    // Not awaited: an iterator that hangs in next() would keep us here as well.
    void iterator.return?.().catch(() => {});
  }
}

async function nextOrAbort(iterator: AsyncIterator<Uint8Array>, signal: AbortSignal) {
  const { promise: aborted, reject } = Promise.withResolvers<never>();
  const onAbort = () => reject(cancellation(signal.reason, action));
  if (signal.aborted) onAbort();
  signal.addEventListener('abort', onAbort, { once: true });
  try {
    return await Promise.race([aborted, iterator.next().catch(explainSender)]);
  } finally {
    signal.removeEventListener('abort', onAbort);
  }
}

function explainSender(error: unknown): never {
  if (error instanceof AppError) throw error;
  throw new AppError('cancelled', `${action}: the sender broke off: ${String(error)}`, {}, { cause: error });
}

const wrongSize = (met: string, announced: number): AppError =>
  new AppError('image_corrupt', `${action}: ${met} bytes arrived, wanted the announced ${announced}`);
