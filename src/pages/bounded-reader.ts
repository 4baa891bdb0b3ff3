/**
 * The blocks of a set as far as they come in time. Storage that is late holds up a migration once, for a moment; one
 * that has failed is not asked again. Reads that never end are left behind: nobody waits for them, at the end least of all.
 */
import { AppError } from '../model/errors.ts';
import type { BlockReader } from './reference-set.ts';

export interface BoundedReader extends BlockReader {
  /** It has failed, or was late: whatever is asked of it fails at once. */
  readonly isLost: boolean;
}

/** Takes the reader over. `undefined`: it could not even be opened. */
export function boundedReader(reader: BlockReader | undefined, timeoutMs: number): BoundedReader {
  let isLost = reader === undefined;
  let left: Promise<unknown> = Promise.resolve();
  return {
    blockCount: reader?.blockCount ?? 0,
    get isLost() {
      return isLost;
    },
    async read(blocks) {
      if (isLost || !reader)
        throw new AppError('image_corrupt', 'Read blocks: the reference set is not there any more');
      const reading = reader.read(blocks);
      left = reading.catch(() => {});
      try {
        return await inTime(reading, timeoutMs);
      } catch (cause) {
        isLost = true;
        throw new AppError('image_corrupt', `Read blocks: ${(cause as Error).message}`, {}, { cause });
      }
    },
    async [Symbol.asyncDispose]() {
      if (!reader) return;
      const disposing = left.then(() => reader[Symbol.asyncDispose]());
      disposing.catch(() => {});
      if (!isLost) await disposing;
    },
  };
}

/** Rejects when it is late; what comes of it later is ignored. */
export async function inTime<T>(work: Promise<T>, timeoutMs: number): Promise<T> {
  const late = Promise.withResolvers<never>();
  work.catch(() => {});
  const timer = setTimeout(() => late.reject(new Error(`nothing within ${timeoutMs} ms`)), timeoutMs);
  try {
    return await Promise.race([work, late.promise]);
  } finally {
    clearTimeout(timer);
  }
}
