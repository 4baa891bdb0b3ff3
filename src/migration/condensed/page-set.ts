/** A set of page numbers as a bitmap: one bit for each page, the first page in the lowest bit of the first byte. */

export class PageSet {
  readonly pages: number;
  readonly #words: Uint32Array;
  #size = 0;

  constructor(pages: number) {
    this.pages = pages;
    this.#words = new Uint32Array(Math.ceil(pages / 32));
  }

  /** How many pages are in it. */
  get size(): number {
    return this.#size;
  }

  has(page: number): boolean {
    return (this.#words[page >>> 5]! & (1 << (page & 31))) !== 0;
  }

  /** Whether it was not there before. */
  add(page: number): boolean {
    const word = this.#words[page >>> 5]!;
    const bit = 1 << (page & 31);
    if (word & bit) return false;
    this.#words[page >>> 5] = word | bit;
    this.#size += 1;
    return true;
  }

  /** Whether it was there. */
  delete(page: number): boolean {
    const word = this.#words[page >>> 5]!;
    const bit = 1 << (page & 31);
    if (!(word & bit)) return false;
    this.#words[page >>> 5] = word & ~bit;
    this.#size -= 1;
    return true;
  }

  addRange(first: number, count: number): void {
    for (let page = first; page < first + count; page++) this.add(page);
  }

  addAll(other: PageSet): void {
    for (let page = other.next(0); page >= 0; page = other.next(page + 1)) this.add(page);
  }

  /** The first page from `from` on that is in the set; -1 if there is none. */
  next(from: number): number {
    if (from >= this.pages) return -1;
    let index = from >>> 5;
    let word = this.#words[index]! & (-1 << (from & 31));
    while (word === 0) {
      index += 1;
      if (index >= this.#words.length) return -1;
      word = this.#words[index]!;
    }
    return index * 32 + 31 - Math.clz32(word & -word);
  }

  /** Runs [first, count] of consecutive pages between `from` and `to`. */
  runs(from = 0, to = this.pages): [number, number][] {
    const runs: [number, number][] = [];
    for (let first = this.next(from); first >= 0 && first < to; ) {
      let end = first + 1;
      while (end < to && this.has(end)) end += 1;
      runs.push([first, end - first]);
      first = this.next(end);
    }
    return runs;
  }

  /** The bitmap itself, little-endian words. */
  toBytes(): Buffer {
    return Buffer.from(this.#words.buffer.slice(0));
  }

  /** Bits behind the last page are ignored. */
  static fromBytes(pages: number, bytes: Uint8Array): PageSet {
    const set = new PageSet(pages);
    new Uint8Array(set.#words.buffer).set(bytes.subarray(0, set.#words.byteLength));
    const rest = pages & 31;
    if (rest) set.#words[set.#words.length - 1]! &= (1 << rest) - 1;
    for (const word of set.#words) set.#size += bitCount(word);
    return set;
  }
}

function bitCount(word: number): number {
  let left = word - ((word >>> 1) & 0x5555_5555);
  left = (left & 0x3333_3333) + ((left >>> 2) & 0x3333_3333);
  return Math.imul((left + (left >>> 4)) & 0x0f0f_0f0f, 0x0101_0101) >>> 24;
}
