/** One buffer that grows: bytes come in at its end and are taken from its front, without an object for each piece. */

const firstBytes = 256 * 1024;

export class ByteQueue {
  /** Valid until the next `push`. */
  buffer: Buffer = Buffer.allocUnsafe(firstBytes);
  /** The first byte that is not taken. */
  start = 0;
  #end = 0;

  get length(): number {
    return this.#end - this.start;
  }

  push(bytes: Uint8Array): void {
    if (this.start === this.#end) this.start = this.#end = 0;
    if (this.#end + bytes.length > this.buffer.length) this.#makeRoom(bytes.length);
    this.buffer.set(bytes, this.#end);
    this.#end += bytes.length;
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
