/**
 * Memory that a session uses again and again: at hundreds of megabytes a second a new buffer for each piece costs more
 * in collecting the old ones than moving the bytes does.
 */
import { KiB, MiB } from '../model/units.ts';

const firstBlockBytes = 16 * KiB;
/** A whole frame of DATA, in whole TLS records. */
export const mostBlockBytes = 256 * KiB;
/** More is given back when it is free. */
const mostFreeBytes = 16 * MiB;

/** Blocks of one session. They grow with its traffic: the next one is twice as large as the last, up to a frame. */
export class BlockPool {
  readonly #free: Buffer[] = [];
  #nextBytes = firstBlockBytes;

  take(): Buffer {
    const known = this.#free.pop();
    if (known) return known;
    const block = Buffer.allocUnsafeSlow(this.#nextBytes);
    this.#nextBytes = Math.min(mostBlockBytes, 2 * this.#nextBytes);
    return block;
  }

  /** Nobody looks at it any more. */
  give(block: Buffer): void {
    // The small ones of the beginning are not worth keeping.
    if (block.length === this.#nextBytes && this.#free.length * block.length < mostFreeBytes)
      this.#free.push(block);
  }
}

/** Bytes in order: appended by copy at one end, and seen where they lie at the other. */
export class BlockQueue {
  readonly #pool = new BlockPool();
  /** Oldest first. Of the first one `#start` bytes are gone, of the last one `#end` are used. */
  #blocks: { memory: Buffer; isOut: boolean }[] = [];
  #start = 0;
  #end = 0;
  #lengthBytes = 0;

  get lengthBytes(): number {
    return this.#lengthBytes;
  }

  append(bytes: Uint8Array): void {
    for (let at = 0; at < bytes.length; ) {
      let last = this.#blocks.at(-1);
      if (!last || this.#end === last.memory.length) {
        last = { memory: this.#pool.take(), isOut: false };
        this.#blocks.push(last);
        this.#end = 0;
      }
      const taken = Math.min(bytes.length - at, last.memory.length - this.#end);
      last.memory.set(taken === bytes.length ? bytes : bytes.subarray(at, at + taken), this.#end);
      this.#end += taken;
      at += taken;
    }
    this.#lengthBytes += bytes.length;
  }

  /** The first bytes, as many as lie in one piece; they stay until they are dropped. */
  first(): Uint8Array | undefined {
    const block = this.#blocks[0];
    if (block === undefined || this.#lengthBytes === 0) return undefined;
    return block.memory.subarray(this.#start, this.#blocks.length === 1 ? this.#end : undefined);
  }

  /** The first bytes are not needed any more: as many as `first` gave, or fewer. */
  drop(lengthBytes: number): void {
    const block = this.#blocks[0]!;
    this.#lengthBytes -= lengthBytes;
    this.#start += lengthBytes;
    if (this.#blocks.length === 1 && this.#start === this.#end && !block.isOut) this.#start = this.#end = 0;
    if (this.#start < block.memory.length) return;
    this.#blocks.shift();
    this.#start = 0;
    if (!block.isOut) this.#pool.give(block.memory);
  }

  /** As `first`, for one who keeps them: they are gone from here, and their memory is not used again. */
  takeFirst(): Uint8Array | undefined {
    const bytes = this.first();
    if (bytes === undefined) return undefined;
    this.#blocks[0]!.isOut = true;
    this.drop(bytes.length);
    return bytes;
  }

  clear(): void {
    this.#blocks = [];
    this.#start = this.#end = this.#lengthBytes = 0;
  }
}
