/** What the two agents say to each other over a memory session. FORMAT.md is the page of it. */
import { AppError } from '../../model/errors.ts';
import { KiB, MiB } from '../../model/units.ts';
import { ByteQueue } from '../../stream/index.ts';

export const protocolVersion = 4;

export const frame = {
  // From the source.
  hello: 1,
  opening: 2,
  blocks: 3,
  batch: 4,
  command: 5,
  tail: 6,
  rest: 7,
  diskBytes: 8,
  diskZeroes: 9,
  diskFlush: 10,
  division: 11,
  slab: 12,
  zeroes: 13,
  divided: 14,
  stale: 15,
  alike: 16,
  mark: 17,
  borrowed: 18,
  // From the destination.
  offer: 64,
  want: 65,
  missing: 66,
  diskOffer: 67,
  diskTaken: 68,
  diskFlushed: 69,
  lost: 70,
  marked: 71,
} as const;
const known = new Set<number>(Object.values(frame));

/** The most that one frame carries; the tail is the largest. */
export const maxFrameBytes = 32 * MiB;
/** What a batch may be on the wire: its pages, if nothing could be squeezed, and what tells of them. */
export const maxBatchBytes = MiB + 128 * KiB;
/** Pages of a batch that are not zero. */
export const batchPages = 256;

const headBytes = 5;

export interface Frame {
  type: number;
  /** Valid until the next push. */
  body: Buffer;
}

export const encodeFrame = (type: number, ...parts: readonly Uint8Array[]): Buffer =>
  Buffer.concat(frameOf(type, ...parts));

/** The same in pieces, so that large ones need no copy. They are the link's from then on. */
export function frameOf(type: number, ...parts: readonly Uint8Array[]): Uint8Array[] {
  const head = Buffer.alloc(headBytes);
  head[0] = type;
  head.writeUInt32BE(
    parts.reduce((sum, { length }) => sum + length, 0),
    1,
  );
  return [head, ...parts];
}

export const encodeJson = (type: number, value: unknown): Buffer =>
  encodeFrame(type, Buffer.from(JSON.stringify(value)));

export function encodeWord(value: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(value);
  return bytes;
}

export class FrameReader {
  readonly #queue = new ByteQueue();

  push(bytes: Uint8Array): void {
    this.#queue.push(bytes);
  }

  /** The next whole frame; `undefined` while it is not all there. Throws for one that cannot be. */
  next(): Frame | undefined {
    const queue = this.#queue;
    const { buffer, start, length } = queue;
    if (length < headBytes) return undefined;
    const type = buffer[start]!;
    const bytes = buffer.readUInt32BE(start + 1);
    if (!known.has(type)) throw agentError(`a frame of the unknown type ${type}`);
    if (bytes > (type === frame.batch ? maxBatchBytes : maxFrameBytes))
      throw agentError(`a frame of type ${type} with ${bytes} bytes`);
    if (length < headBytes + bytes) return undefined;
    queue.start += headBytes + bytes;
    return { type, body: buffer.subarray(start + headBytes, start + headBytes + bytes) };
  }
}

/** The other agent broke the protocol: it is not of our version, or not one of ours. */
export const agentError = (found: string): AppError =>
  new AppError('peer_unreachable', `The agent at the other end of the migration sent ${found}`, {
    reason: 'protocol',
  });
