/**
 * An index in memory that changes while it is used: disk blocks mirrored in this migration, clean blocks of a disk
 * that a guest goes on writing to. Bounded: when it is full it learns nothing more, which costs bytes only.
 *
 * Open addressing with linear probing over flat arrays, about 60 bytes for an entry. Of equal contents the first
 * block is kept, so that a guest that writes the same everywhere makes no long chains.
 */
import { digestBytes, noBlock } from './blocks.ts';
import type { SetIndex } from './reference-set.ts';

const emptySlot = 0;
const removedSlot = 0xffff_ffff;

export class MemoryIndex implements SetIndex {
  readonly #maxEntries: number;
  /** Entry number + 1, by digest. */
  readonly #slots: Uint32Array;
  readonly #slotMask: number;
  readonly #digests: Buffer;
  readonly #blocks: Uint32Array;
  readonly #entryOfBlock = new Map<number, number>();
  readonly #free: number[] = [];
  #used = 0;
  #removed = 0;

  constructor(options: { maxEntries: number }) {
    this.#maxEntries = options.maxEntries;
    const slots = 2 ** Math.ceil(Math.log2(Math.max(16, options.maxEntries * 1.5)));
    this.#slots = new Uint32Array(slots);
    this.#slotMask = slots - 1;
    this.#digests = Buffer.alloc(options.maxEntries * digestBytes);
    this.#blocks = new Uint32Array(options.maxEntries);
  }

  get entries(): number {
    return this.#entryOfBlock.size;
  }

  /** All blocks that it knows. They may be deleted meanwhile. */
  blocks(): Iterable<number> {
    return this.#entryOfBlock.keys();
  }

  /** The block now has this content (digest at `at` of `digests`). False when the index did not take it. */
  set(block: number, digests: Uint8Array, at = 0): boolean {
    this.delete(block);
    if (this.#find(digests, at) >= 0) return false;
    const entry = this.#free.pop() ?? (this.#used < this.#maxEntries ? this.#used++ : -1);
    if (entry < 0) return false;
    this.#digests.set(digests.subarray(at, at + digestBytes), entry * digestBytes);
    this.#blocks[entry] = block;
    this.#entryOfBlock.set(block, entry);
    this.#insert(entry);
    return true;
  }

  /** The block has changed to something unknown. */
  delete(block: number): void {
    const entry = this.#entryOfBlock.get(block);
    if (entry === undefined) return;
    const slot = this.#find(this.#digests, entry * digestBytes);
    this.#slots[slot] = removedSlot;
    this.#removed += 1;
    this.#entryOfBlock.delete(block);
    this.#free.push(entry);
    // Slots of the removed lengthen the way to the others.
    if (this.#removed > this.#slots.length / 8) this.#rebuild();
  }

  lookup(digests: Uint8Array): Promise<Uint32Array> {
    const found = new Uint32Array(digests.length / digestBytes);
    for (let i = 0; i < found.length; i += 1) {
      const slot = this.#find(digests, i * digestBytes);
      found[i] = slot < 0 ? noBlock : this.#blocks[this.#slots[slot]! - 1]!;
    }
    return Promise.resolve(found);
  }

  async [Symbol.asyncDispose](): Promise<void> {}

  /** The slot of this digest, or -1. */
  #find(digests: Uint8Array, at: number): number {
    for (let slot = this.#firstSlot(digests, at); ; slot = (slot + 1) & this.#slotMask) {
      const held = this.#slots[slot]!;
      if (held === emptySlot) return -1;
      if (held === removedSlot) continue;
      const entry = (held - 1) * digestBytes;
      if (this.#digests.compare(digests, at, at + digestBytes, entry, entry + digestBytes) === 0) return slot;
    }
  }

  #insert(entry: number): void {
    let slot = this.#firstSlot(this.#digests, entry * digestBytes);
    while (this.#slots[slot] !== emptySlot) slot = (slot + 1) & this.#slotMask;
    this.#slots[slot] = entry + 1;
  }

  #rebuild(): void {
    this.#slots.fill(emptySlot);
    this.#removed = 0;
    for (const entry of this.#entryOfBlock.values()) this.#insert(entry);
  }

  /** A digest is as good as random, so its first bits spread well. */
  #firstSlot(digests: Uint8Array, at: number): number {
    return (
      (digests[at]! | (digests[at + 1]! << 8) | (digests[at + 2]! << 16) | (digests[at + 3]! << 24)) &
      this.#slotMask
    );
  }
}
