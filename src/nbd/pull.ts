/**
 * Lets a parser be written as it reads: a generator that asks for bytes (`const head = yield 28`) and gets them as one
 * piece. What is held is bounded by what it asks for and the size of a chunk. It does no I/O.
 */
export type Parser = Generator<number, void, Buffer>;

export class Pull {
  readonly #parser: Parser;
  /** Bytes that the parser waits for; undefined when it has ended. */
  #wanted: number | undefined;
  #held: Buffer[] = [];
  #heldBytes = 0;
  #failure: { error: unknown } | undefined;

  /** Runs the parser up to its first wish. */
  constructor(parser: Parser) {
    this.#parser = parser;
    this.#wanted = this.#next(undefined);
  }

  /** Bytes kept because they are not enough yet. */
  get heldBytes(): number {
    return this.#heldBytes;
  }

  /** Throws what the parser throws, then and ever after. Bytes after its end are ignored. */
  push(bytes: Buffer): void {
    if (this.#failure) throw this.#failure.error;
    if (this.#wanted === undefined) return;
    this.#held.push(bytes);
    this.#heldBytes += bytes.length;
    while (this.#wanted !== undefined && this.#heldBytes >= this.#wanted)
      this.#wanted = this.#next(this.#take(this.#wanted));
  }

  #next(piece: Buffer | undefined): number | undefined {
    try {
      // The first call of a generator has nobody to give its argument to.
      const { value, done } = this.#parser.next(piece as Buffer);
      return done ? undefined : (value as number);
    } catch (error) {
      this.#failure = { error };
      this.#held = [];
      throw error;
    }
  }

  #take(length: number): Buffer {
    this.#heldBytes -= length;
    const parts: Buffer[] = [];
    for (let left = length; left > 0; ) {
      const next = this.#held[0]!;
      parts.push(next.subarray(0, left));
      if (next.length > left) this.#held[0] = next.subarray(left);
      else this.#held.shift();
      left -= Math.min(left, next.length);
    }
    return parts.length === 1 ? parts[0]! : Buffer.concat(parts, length);
  }
}
