/**
 * Packs small pieces of a stream into blocks, one behind the other, so that a million pieces of one byte cost about
 * a megabyte and not a million objects, each of which keeps a whole network buffer alive.
 */
import { KiB } from '../model/units.ts';

const blockBytes = 16 * KiB;

export class Packer {
  #block = Buffer.alloc(0);
  #usedBytes = 0;
  /** The piece that was given out last, which may grow, and where it starts. */
  #piece: Uint8Array | undefined;
  #pieceStart = 0;

  /** Appends a copy of `bytes` to the list of pieces: its last piece grows if it is ours, else a new one stands behind. */
  append(pieces: Uint8Array[], bytes: Uint8Array): void {
    const grows = this.#piece !== undefined && pieces.at(-1) === this.#piece;
    if (this.#usedBytes + bytes.length > this.#block.length) {
      this.#block = Buffer.allocUnsafeSlow(Math.max(blockBytes, bytes.length));
      this.#usedBytes = 0;
      this.#piece = undefined;
    }
    const replaces = grows && this.#piece !== undefined;
    if (!replaces) this.#pieceStart = this.#usedBytes;
    this.#block.set(bytes, this.#usedBytes);
    this.#usedBytes += bytes.length;
    this.#piece = this.#block.subarray(this.#pieceStart, this.#usedBytes);
    if (replaces) pieces[pieces.length - 1] = this.#piece;
    else pieces.push(this.#piece);
  }
}
