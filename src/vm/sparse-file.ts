/**
 * Writes a stream to a file and leaves a hole wherever a piece of a block is zero: the file reads the same and
 * takes less room. Pieces are cut at block borders of the file, however the chunks arrive.
 */
import type { FileHandle } from 'node:fs/promises';

const blockBytes = 4096;
const zeros = Buffer.alloc(blockBytes);

export class SparseWriter {
  readonly #handle: FileHandle;
  #position = 0;
  #writtenBytes = 0;

  /** Goes on at `position`, behind what the file holds. */
  constructor(handle: FileHandle, position = 0) {
    this.#handle = handle;
    this.#position = position;
  }

  /** Length of the file so far, holes included. */
  get position(): number {
    return this.#position;
  }

  /** Bytes that were written and not left out. */
  get writtenBytes(): number {
    return this.#writtenBytes;
  }

  async write(chunk: Uint8Array): Promise<void> {
    let runStart = 0;
    let at = 0;
    while (at < chunk.length) {
      const length = Math.min(blockBytes - ((this.#position + at) % blockBytes), chunk.length - at);
      if (isZero(chunk, at, length)) {
        await this.#writeRun(chunk, runStart, at);
        runStart = at + length;
      }
      at += length;
    }
    await this.#writeRun(chunk, runStart, at);
    this.#position += chunk.length;
  }

  /** Gives the file its length (it may end in a hole) and puts it on the disk. */
  async finish(): Promise<void> {
    await this.#handle.truncate(this.#position);
    await this.#handle.sync();
  }

  async #writeRun(chunk: Uint8Array, start: number, end: number): Promise<void> {
    let at = start;
    while (at < end) {
      const { bytesWritten } = await this.#handle.write(chunk, at, end - at, this.#position + at);
      at += bytesWritten;
      this.#writtenBytes += bytesWritten;
    }
  }
}

const isZero = (chunk: Uint8Array, at: number, length: number): boolean =>
  chunk[at] === 0 && zeros.compare(chunk, at, at + length, 0, length) === 0;
