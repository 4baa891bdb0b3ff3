/**
 * What the destination has of pages that were sent: for a digest the page that has this content there now. It holds
 * 64 bits of each digest, for whatever it finds wrongly the destination notices by the digest of the batch.
 *
 * About 32 bytes for each page of the guest; a guest beyond `maxPages` goes without.
 */
import { digestBytes } from '../../pages/index.ts';

export const maxPages = 2 ** 22;

export class SentIndex {
  readonly #low: Uint32Array;
  readonly #high: Uint32Array;
  /** Page + 1 by slot; 0 is free. What a slot says counts only if the page still has that content. */
  readonly #slots: Uint32Array;
  readonly #mask: number;
  #used = 0;

  constructor(pages: number) {
    const tracked = pages <= maxPages ? pages : 0;
    this.#low = new Uint32Array(tracked);
    this.#high = new Uint32Array(tracked);
    const slots = 2 ** Math.ceil(Math.log2(Math.max(16, tracked * 2)));
    this.#slots = new Uint32Array(slots);
    this.#mask = slots - 1;
  }

  /** A page whose content has this digest; -1 if there is none. */
  find(digests: Uint8Array, index: number): number {
    const [low, high] = keyOf(digests, index);
    for (let slot = low & this.#mask; ; slot = (slot + 1) & this.#mask) {
      const held = this.#slots[slot]!;
      if (held === 0) return -1;
      if (this.#low[held - 1] === low && this.#high[held - 1] === high) return held - 1;
    }
  }

  set(page: number, digests: Uint8Array, index: number): void {
    if (page >= this.#low.length) return;
    const [low, high] = keyOf(digests, index);
    const isSame = this.#low[page] === low && this.#high[page] === high;
    this.#low[page] = low;
    this.#high[page] = high;
    if (!isSame) this.#insert(page);
  }

  /** The page has another content now, one that is not looked for. */
  forget(page: number): void {
    if (page < this.#low.length) this.#low[page] = this.#high[page] = 0;
  }

  #insert(page: number): void {
    if (this.#used > this.#slots.length * 0.7) this.#rebuild();
    const low = this.#low[page]!;
    for (let slot = low & this.#mask; ; slot = (slot + 1) & this.#mask) {
      const held = this.#slots[slot]!;
      if (held === 0) {
        this.#slots[slot] = page + 1;
        this.#used += 1;
        return;
      }
      // Of equal contents one page is enough.
      if (this.#low[held - 1] === low && this.#high[held - 1] === this.#high[page]) return;
    }
  }

  /** Without the slots of contents that are gone. */
  #rebuild(): void {
    this.#slots.fill(0);
    this.#used = 0;
    for (let page = 0; page < this.#low.length; page++)
      if (this.#low[page] !== 0 || this.#high[page] !== 0) this.#insert(page);
  }
}

/** A digest is as good as random; that of 0 stands for none. */
function keyOf(digests: Uint8Array, index: number): [number, number] {
  const at = index * digestBytes;
  return [word(digests, at) || 1, word(digests, at + 4)];
}

const word = (bytes: Uint8Array, at: number): number =>
  (bytes[at]! | (bytes[at + 1]! << 8) | (bytes[at + 2]! << 16) | (bytes[at + 3]! << 24)) >>> 0;
