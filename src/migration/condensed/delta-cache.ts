/**
 * The last content that was sent of pages which were sent more than once: the ones that the guest keeps writing, and
 * of which little changes from round to round. Bounded; the oldest goes.
 */
import { pageBytes } from '../../stream/index.ts';

const slots = 8192;
/** A delta with more changed words than this is no better than the page itself. */
const mostChanged = pageBytes / 4 / 2;

export class DeltaCache {
  #content: Uint32Array | undefined;
  readonly #slotOfPage: Int32Array;
  readonly #pageOfSlot = new Int32Array(slots).fill(-1);
  #next = 0;

  constructor(pages: number) {
    this.#slotOfPage = new Int32Array(pages).fill(-1);
  }

  /** The page's content begins at this word. */
  put(page: number, content: Uint32Array, at: number): void {
    this.#content ??= new Uint32Array((slots * pageBytes) / 4);
    let slot = this.#slotOfPage[page]!;
    if (slot < 0) {
      slot = this.#next;
      this.#next = (this.#next + 1) % slots;
      const before = this.#pageOfSlot[slot]!;
      if (before >= 0) this.#slotOfPage[before] = -1;
      this.#pageOfSlot[slot] = page;
      this.#slotOfPage[page] = slot;
    }
    this.#content.set(content.subarray(at, at + pageBytes / 4), (slot * pageBytes) / 4);
  }

  forget(page: number): void {
    const slot = this.#slotOfPage[page]!;
    if (slot < 0) return;
    this.#slotOfPage[page] = -1;
    this.#pageOfSlot[slot] = -1;
  }

  /** What to xor the version sent before with; `undefined` if that is not known, or changed too much. */
  delta(page: number, content: Uint32Array, at: number): Buffer | undefined {
    const slot = this.#slotOfPage[page]!;
    if (slot < 0) return undefined;
    const old = this.#content!;
    const words = pageBytes / 4;
    const from = slot * words;
    const changed = new Uint32Array(words);
    let count = 0;
    for (let index = 0; index < words; index++) {
      const bits = content[at + index]! ^ old[from + index]!;
      if (bits === 0) continue;
      changed[index] = bits;
      count += 1;
      if (count > mostChanged) return undefined;
    }
    return Buffer.from(changed.buffer);
  }
}
