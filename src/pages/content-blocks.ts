/** A disk, or any content that can be read by offset, as the two halves of a reference set. Only whole blocks count. */
import { AppError } from '../model/errors.ts';
import { blockBytes } from './blocks.ts';
import { type BlockReader, type BlockSource, maxPieceBlocks, type Piece } from './reference-set.ts';

/** What `openDiskContent` of the VM room gives. */
export interface Content extends AsyncDisposable {
  readonly virtualBytes: number;
  read(offset: number, into: Buffer): Promise<void>;
  dataRanges(signal: AbortSignal): AsyncIterable<{ offset: number; lengthBytes: number }>;
}

const readsAtOnce = 8;

/** For `buildIndex`. The content stays the caller's to close. */
export function contentSource(content: Content): BlockSource {
  const blockCount = Math.floor(content.virtualBytes / blockBytes);
  return {
    blockCount,
    async *pieces(signal: AbortSignal): AsyncIterable<Piece> {
      let next = 0;
      for await (const { offset, lengthBytes } of content.dataRanges(signal)) {
        // A range may begin or end inside a block, and the next one in the same block.
        const end = Math.min(blockCount, Math.ceil((offset + lengthBytes) / blockBytes));
        for (let first = Math.max(next, Math.floor(offset / blockBytes)); first < end; first = next) {
          next = Math.min(end, first + maxPieceBlocks);
          const bytes = Buffer.allocUnsafeSlow((next - first) * blockBytes);
          await content.read(first * blockBytes, bytes);
          yield { first, bytes };
        }
      }
    },
  };
}

/** Takes the content over and closes it. */
export function contentReader(content: Content): BlockReader {
  const blockCount = Math.floor(content.virtualBytes / blockBytes);
  return {
    blockCount,
    async read(blocks: Uint32Array): Promise<Buffer> {
      const bytes = Buffer.allocUnsafe(blocks.length * blockBytes);
      const runs = runsOf(blocks, blockCount);
      let next = 0;
      const readSome = async () => {
        for (let run = runs[next++]; run; run = runs[next++]) {
          const { at, block, count } = run;
          await content.read(block * blockBytes, bytes.subarray(at * blockBytes, (at + count) * blockBytes));
        }
      };
      await Promise.all(Array.from({ length: Math.min(readsAtOnce, runs.length) }, readSome));
      return bytes;
    },
    [Symbol.asyncDispose]: () => content[Symbol.asyncDispose](),
  };
}

export interface Run {
  /** Index in what was asked for. */
  at: number;
  block: number;
  count: number;
}

/** Consecutive numbers as runs of at most `maxPieceBlocks`. Throws `invalid_request` for one out of range. */
export function runsOf(blocks: Uint32Array, blockCount: number): Run[] {
  const runs: Run[] = [];
  let last: Run | undefined;
  for (let at = 0; at < blocks.length; at += 1) {
    const block = blocks[at]!;
    if (block >= blockCount)
      throw new AppError(
        'invalid_request',
        `Read blocks: block is ${block}, wanted less than ${blockCount}`,
        {
          problems: [{ field: 'block', value: block, wanted: `less than ${blockCount}` }],
        },
      );
    if (last && last.block + last.count === block && last.count < maxPieceBlocks) last.count += 1;
    else {
      last = { at, block, count: 1 };
      runs.push(last);
    }
  }
  return runs;
}
