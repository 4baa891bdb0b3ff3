/**
 * One buffer that grows: bytes come in at its end and are taken from its front, without an object for each piece. Bytes
 * that are taken at once need not even be copied: they are *lent*, and what is left of them is kept.
 */

const firstBytes = 256 * 1024;

export class ByteQueue {
  /** Valid until the next `push`. */
  buffer: Buffer = Buffer.allocUnsafe(firstBytes);
  /** The first byte that is not taken. */
  start = 0;
  #end = 0;
  /** The queue's own, while `buffer` is lent. */
  #own: Buffer | undefined;

  get length(): number {
    return this.#end - this.start;
  }

  push(bytes: Uint8Array): void {
    if (this.start === this.#end) this.start = this.#end = 0;
    if (this.#end + bytes.length > this.buffer.length) this.#makeRoom(bytes.length);
    this.buffer.set(bytes, this.#end);
    this.#end += bytes.length;
  }

  /** Whoever lends must not change the bytes before `keep`. Only to an empty queue. */
  lend(bytes: Uint8Array): void {
    this.#own = this.buffer;
    this.buffer = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    this.start = 0;
    this.#end = bytes.length;
  }

  /** What was not taken of the bytes that were lent becomes the queue's own. */
  keep(): void {
    const lent = this.buffer;
    const { start } = this;
    const end = this.#end;
    this.buffer = this.#own!;
    this.#own = undefined;
    this.start = this.#end = 0;
    if (end > start) this.push(lent.subarray(start, end));
  }

  /** Gives back the last bytes that came. */
  drop(bytes: number): void {
    this.#end -= bytes;
  }

  /** Everything that is left, as a copy. */
  takeAll(): Buffer {
    const all = Buffer.from(this.buffer.subarray(this.start, this.#end));
    this.start = this.#end;
    return all;
  }

  #makeRoom(moreBytes: number): void {
    const wanted = this.length + moreBytes;
    const old = this.buffer;
    if (wanted * 2 > old.length) this.buffer = Buffer.allocUnsafe(Math.max(wanted * 2, old.length));
    old.copy(this.buffer, 0, this.start, this.#end);
    this.#end -= this.start;
    this.start = 0;
  }
}
