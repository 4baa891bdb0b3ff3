/**
 * A byte sequence without end that any program makes in a few lines: the 32-bit words 0, 1, 2, ... in big-endian order
 * (after 16 GiB they begin again). A receiver that checks it knows that not one byte was lost, doubled or moved.
 */

/** The bytes of the sequence from `offset` on. */
export function sequenceBytes(offset: number, length: number): Buffer {
  const firstWord = Math.floor(offset / 4);
  const words = Buffer.allocUnsafe((Math.ceil((offset + length) / 4) - firstWord) * 4);
  const view = new DataView(words.buffer, words.byteOffset, words.length);
  for (let at = 0; at < words.length; at += 4) view.setUint32(at, (firstWord + at / 4) % 2 ** 32);
  return words.subarray(offset - firstWord * 4, offset - firstWord * 4 + length);
}

/** Takes the sequence in any pieces. */
export class SequenceCheck {
  #bytes = 0;

  /** How many bytes were right so far, which is all of them. */
  get bytes(): number {
    return this.#bytes;
  }

  /** Throws at the first byte that differs, with its offset. */
  push(piece: Buffer): void {
    const wanted = sequenceBytes(this.#bytes, piece.length);
    if (!piece.equals(wanted)) {
      const at = piece.findIndex((byte, index) => byte !== wanted[index]);
      throw new Error(`byte ${this.#bytes + at} is ${piece[at]}, wanted ${wanted[at]}`);
    }
    this.#bytes += piece.length;
  }
}
