/**
 * What VMs of one tenant share that leave one source for one destination at the same time: the key that seals their
 * slabs, one row of numbers for these, and in which of them a content is. A page that is like one in a slab of another VM
 * needs no slab of its own: the relays that hold that one hold it for both (`RelayClient.share`), each VM in a group of its
 * own. So whatever becomes of one, none loses what it refers to.
 *
 * A VM that shares with nobody has a pool of its own.
 */
import type { Uuid } from '../../model/ids.ts';
import { newKey } from '../../relay/index.ts';
import type { Run } from './division.ts';

/** Where content is: in which slab, as which page of the VM that has put it there. */
export interface Content {
  slab: number;
  page: number;
}

/** A slab that relays hold, for the VMs that would refer to it. */
export interface PooledSlab {
  /** Shows a relay the right to it. */
  group: string;
  /** Sealed bytes of each part. */
  parts: number[];
  runs: readonly Run[];
  /** They hold it, or did. */
  relays: readonly Uuid[];
}

interface Entry {
  group: string;
  isPlaced: boolean;
  placed: PromiseWithResolvers<PooledSlab | undefined>;
}

/** Of which content is known again, the oldest are forgotten first: 100 bytes each, about, and twice so many at the most. */
const mostContents = 250_000;
/** Slabs that others may still refer to; a kilobyte each, about. */
const mostSlabs = 32_768;
/** Of a digest, as the name of a content. */
const nameBytes = 16;

export class Pool {
  /** What the slabs are sealed for. */
  readonly id: Uuid;
  readonly key = newKey();
  readonly #onEmpty: () => void;
  readonly #members = new Set<string>();
  readonly #slabs = new Map<number, Entry>();
  /** By digest. Those of slabs that are no more are passed over. */
  #contents = new Map<string, Content>();
  #olderContents = new Map<string, Content>();
  #nextSlab = 1;

  /** `onEmpty`: the last member has left. */
  constructor(id: Uuid, onEmpty: () => void = () => {}) {
    this.id = id;
    this.#onEmpty = onEmpty;
  }

  /** `group`: of the VM's slabs at relays, which no other member has. */
  join(group: string): void {
    this.#members.add(group);
  }

  /** What it has not placed will not come; what it has stays where it is, unless it is `dropped`. */
  leave(group: string, { dropped }: { dropped: boolean }): void {
    for (const [slab, entry] of this.#slabs)
      if (entry.group === group && (dropped || !entry.isPlaced)) this.forget(slab, group);
    if (this.#members.delete(group) && this.#members.size === 0) this.#onEmpty();
  }

  /** The number that the next slab will have. */
  get nextSlab(): number {
    return this.#nextSlab;
  }

  /** The number of a slab that the group is to have. No number is given twice. */
  begin(group: string): number {
    const slab = this.#nextSlab++;
    for (const [oldest, entry] of this.#slabs) {
      if (this.#slabs.size < mostSlabs) break;
      this.forget(oldest, entry.group);
    }
    this.#slabs.set(slab, { group, isPlaced: false, placed: Promise.withResolvers() });
    return slab;
  }

  place(slab: number, placed: PooledSlab): void {
    const entry = this.#slabs.get(slab);
    if (!entry) return;
    entry.isPlaced = true;
    entry.placed.resolve(placed);
  }

  /** Nobody is to refer to the group's slab any more. Those that do already keep it. */
  forget(slab: number, group: string): void {
    const entry = this.#slabs.get(slab);
    if (entry?.group !== group) return;
    this.#slabs.delete(slab);
    entry.placed.resolve(undefined);
  }

  /** Relays do not hold it. Those of one who has left may have forgotten all that was its. */
  lose(slab: number): void {
    const entry = this.#slabs.get(slab);
    if (!entry) return;
    if (this.#members.has(entry.group)) this.forget(slab, entry.group);
    else this.leave(entry.group, { dropped: true });
  }

  /** Resolves when relays hold the slab, or will not. Missing unless it is another member's. */
  ofOthers(slab: number, group: string): Promise<PooledSlab | undefined> | undefined {
    const entry = this.#slabs.get(slab);
    return entry && entry.group !== group ? entry.placed.promise : undefined;
  }

  find(digest: Buffer): Content | undefined {
    const name = nameOf(digest);
    return this.#contents.get(name) ?? this.#olderContents.get(name);
  }

  /** From now on content with this digest is there. */
  note(digest: Buffer, content: Content): void {
    if (this.#contents.size >= mostContents) {
      this.#olderContents = this.#contents;
      this.#contents = new Map();
    }
    this.#contents.set(nameOf(digest), content);
  }
}

const nameOf = (digest: Buffer): string => digest.toString('latin1', 0, nameBytes);
