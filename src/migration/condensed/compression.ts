/**
 * Whether and how a batch is compressed: with zstd in libuv's threads as long as that brings its bytes to the other
 * side sooner than sending them plain would, judged by what was measured of link, compressor and content.
 */
import { promisify } from 'node:util';
import { constants, zstdCompress, zstdDecompress } from 'node:zlib';
import { agentError } from './frames.ts';

const compress = promisify(zstdCompress);
const decompress = promisify(zstdDecompress);

/** Levels above 1 cost 1.6 times the CPU for 6 to 8 % (facts on guests' memory). */
const level = 1;
/** How often the way that was not chosen is tried again. */
const retryEvery = 16;
/** Below this the compressor is never the bottleneck. */
const smallBytes = 64 * 1024;
/** On a slower link it is not either, whatever a busy moment of the machine made of it. */
const slowBytesPerSecond = 40e6;
const worthRatio = 0.95;
const smoothing = 0.3;
/** What zstd may add to bytes that it cannot compress, and more. */
const slackBytes = 8 * 1024;

/** `off` and `always` are for measurements. */
export type CompressionMode = 'adaptive' | 'off' | 'always';

export interface Squeezed {
  compressed: boolean;
  bytes: Buffer;
}

export class Compressor {
  /** Bytes per second that go in; and what part of them comes out. */
  #speed = 0;
  #ratio = 0.5;
  #plainInRow = 0;
  #running = 0;
  readonly #mode: CompressionMode;

  constructor(mode: CompressionMode = 'adaptive') {
    this.#mode = mode;
  }

  /** Whether it is worth it for so many bytes. `linkSpeed` in bytes per second; `undefined` when not measured yet. */
  pays(bytes: number, linkSpeed: number | undefined): boolean {
    const pays = this.#mode === 'always' || (this.#mode === 'adaptive' && this.#isFaster(bytes, linkSpeed));
    this.#plainInRow = pays ? 0 : this.#plainInRow + 1;
    return pays;
  }

  /** The bytes may change when it is done, and not before. */
  async squeeze(bytes: Buffer): Promise<Squeezed & { tookMs: number }> {
    const startedAt = performance.now();
    this.#running += 1;
    const atFirst = this.#running;
    const squeezed = await compress(bytes, {
      params: { [constants.ZSTD_c_compressionLevel]: level },
      // A context for no more than that is made in half the time, which is most of it where batches are small.
      ...(bytes.length <= smallBytes && { pledgedSrcSize: bytes.length }),
      // Of one piece mostly: each piece more is another turn in a thread, and too large a one is memory for nothing.
      chunkSize: Math.ceil(bytes.length * Math.min(1, this.#ratio * 1.2)) + slackBytes,
    });
    const ms = performance.now() - startedAt;
    // Others were compressed in the same time.
    const together = (atFirst + this.#running) / 2;
    this.#running -= 1;
    if (bytes.length > smallBytes) {
      const speed = (bytes.length * together * 1000) / Math.max(0.01, ms);
      this.#speed = this.#speed === 0 ? speed : smooth(this.#speed, speed);
      this.#ratio = smooth(this.#ratio, squeezed.length / bytes.length);
    }
    if (squeezed.length >= bytes.length) return { compressed: false, bytes: Buffer.from(bytes), tookMs: ms };
    return { compressed: true, bytes: squeezed, tookMs: ms };
  }

  #isFaster(bytes: number, linkSpeed: number | undefined): boolean {
    if (bytes < smallBytes || linkSpeed === undefined || this.#speed === 0) return true;
    if (this.#plainInRow >= retryEvery) return true;
    if (linkSpeed < slowBytesPerSecond) return this.#ratio < worthRatio;
    // Compressing and sending go on side by side, so the slower of the two counts.
    const plain = bytes / linkSpeed;
    const squeezed = Math.max(bytes / this.#speed, (bytes * this.#ratio) / linkSpeed);
    return squeezed < plain;
  }
}

/** What is not compressed is given as it is. Throws when it is no zstd, or more than `mostBytes`. */
export async function unsqueeze(squeezed: Squeezed, mostBytes: number): Promise<Buffer> {
  if (!squeezed.compressed) return squeezed.bytes;
  try {
    // Of one piece, see above.
    return await decompress(squeezed.bytes, {
      maxOutputLength: mostBytes,
      chunkSize: mostBytes + slackBytes,
    });
  } catch (error) {
    throw agentError(`what cannot be unpacked: ${(error as Error).message}`);
  }
}

const smooth = (before: number, now: number): number => before * (1 - smoothing) + now * smoothing;
