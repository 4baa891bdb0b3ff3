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
/** So many blocks that nobody wants are cheaper to read than to leave out. */
const mostGapBlocks = 8;
const mostSpanBlocks = 64;

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

/**
 * Takes the content over and closes it. What it gives lies in a buffer of its own: a migration reads hundreds of
 * megabytes, and collecting a buffer for each read costs more CPU than the reads.
 */
export function contentReader(content: Content): BlockReader {
  const blockCount = Math.floor(content.virtualBytes / blockBytes);
  let given = Buffer.alloc(0);
  let spare: Buffer[] = [];
  return {
    blockCount,
    async read(blocks: Uint32Array): Promise<Buffer> {
      const spans = spansOf(blocks, blockCount);
      const wantedBytes = blocks.length * blockBytes;
      if (given.length < wantedBytes) given = Buffer.allocUnsafeSlow(wantedBytes);
      const [bytes, buffers] = [given, spare];
      let next = 0;
      const readSome = async () => {
        for (let span = spans[next++]; span; span = spans[next++]) {
          const whole = buffers.pop() ?? Buffer.allocUnsafeSlow(mostSpanBlocks * blockBytes);
          const { first, count, places } = span;
          await content.read(first * blockBytes, whole.subarray(0, count * blockBytes));
          for (const at of places) {
            const from = (blocks[at]! - first) * blockBytes;
            whole.copy(bytes, at * blockBytes, from, from + blockBytes);
          }
          buffers.push(whole);
        }
      };
      try {
        await Promise.all(Array.from({ length: Math.min(readsAtOnce, spans.length) }, readSome));
      } catch (error) {
        // Others of these reads may still be filling them.
        given = Buffer.alloc(0);
        spare = [];
        throw error;
      }
      return bytes.subarray(0, wantedBytes);
    },
    [Symbol.asyncDispose]: () => content[Symbol.asyncDispose](),
  };
}

/** Blocks that are read at once, with those between them that nobody asked for. */
interface Span {
  first: number;
  count: number;
  /** Indices in what was asked for. */
  places: number[];
}

/** Memory holds a file's blocks in any order, and each read is a turn in a thread. Throws as `runsOf` does. */
function spansOf(blocks: Uint32Array, blockCount: number): Span[] {
  const order = Array.from(blocks, (block, at) => {
    assertInside(block, blockCount);
    return at;
  }).sort((a, b) => blocks[a]! - blocks[b]!);
  const spans: Span[] = [];
  for (const at of order) {
    const block = blocks[at]!;
    const last = spans.at(-1);
    const isNear =
      last && block <= last.first + last.count + mostGapBlocks && block < last.first + mostSpanBlocks;
    if (isNear) {
      last.count = block - last.first + 1;
      last.places.push(at);
    } else spans.push({ first: block, count: 1, places: [at] });
  }
  return spans;
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
    assertInside(block, blockCount);
    if (last && last.block + last.count === block && last.count < maxPieceBlocks) last.count += 1;
    else {
      last = { at, block, count: 1 };
      runs.push(last);
    }
  }
  return runs;
}

function assertInside(block: number, blockCount: number): void {
  if (block < blockCount) return;
  const problem = { field: 'block', value: block, wanted: `less than ${blockCount}` };
  throw new AppError('invalid_request', `Read blocks: block is ${block}, wanted ${problem.wanted}`, {
    problems: [problem],
  });
}
