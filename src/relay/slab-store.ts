/**
 * What a relay holds: sealed slabs, by group (one migration of one source) and number, on a shelf: in memory, or in files.
 * Nothing is reserved: a slab is taken while there is room at that moment. Groups may share slabs, which then are held as
 * long as one of them has them. Pure but for the shelf and the two functions it is given.
 *
 * Invariants: the bytes held never exceed the quota that held when the last of them was taken; a group outlives its
 * last session by its lease and no more.
 */
/** Where the bytes of slabs are. `Bytes` is what reading gives, at once or later. */
export interface Shelf<Bytes> {
  /** Keeps a copy. A promise may reject, and then nothing is kept. */
  keep(group: string, bytes: Uint8Array): Kept<Bytes> | Promise<Kept<Bytes>>;
  /** Nothing of the group is needed any more. */
  forget(group: string): void;
  /** What was kept takes its room until its group is forgotten, also when nobody needs it any more. */
  isAppendOnly?: boolean;
}

export interface Kept<Bytes> {
  length: number;
  read(): Bytes;
}

export const memoryShelf: Shelf<Buffer> = {
  keep: (_, bytes) => {
    // A buffer of its own: one out of Node's pool would keep 64 KiB alive for it.
    const copy = Buffer.allocUnsafeSlow(bytes.length);
    copy.set(bytes);
    return { length: copy.length, read: () => copy };
  },
  forget: () => {},
};

export interface SlabStoreOptions<Bytes> {
  shelf: Shelf<Bytes>;
  /** Bytes that it may hold; 0 takes nothing. */
  quotaBytes: number;
  /** What the host could give beside that now. */
  availableBytes: () => number;
  /** In ms. */
  now: () => number;
  /** Of any group, whatever it asks for. */
  longestLeaseMs?: number;
}

export interface GroupFacts {
  slabs: number;
  bytes: number;
  sessions: number;
}

interface Held<Bytes> {
  kept: Kept<Bytes>;
  /** How many have it. */
  groups: number;
}

interface Group<Bytes> {
  slabs: Map<number, Held<Bytes>>;
  /** On their way to the shelf. */
  coming: number;
  /** Told when a slab is there. */
  expected: Map<number, Set<() => void>>;
  /** Of its slabs, whoever else has them. */
  bytes: number;
  /** What the shelf does not give back before it forgets the group. */
  wasteBytes: number;
  sessions: number;
  leaseMs: number;
  expiresAt: number;
  /** Nothing is taken any more: what another relay still gives on comes too late. */
  isDropped: boolean;
}

/** What a slab costs beside its bytes, about. */
const overheadBytes = 256;
/** So much of what the host has is never lent: a relay has VMs of its own. */
const reserveBytes = 256 * 1024 * 1024;
const mostGroups = 256;
export const longestLeaseMs = 3_600_000;
/** A disk that is lost is lost for good, and disk space is not missed as memory is. */
export const longestDiskLeaseMs = 24 * longestLeaseMs;

export class SlabStore<Bytes = Buffer> {
  readonly #options: SlabStoreOptions<Bytes>;
  readonly #groups = new Map<string, Group<Bytes>>();
  #quotaBytes: number;
  #usedBytes = 0;

  constructor(options: SlabStoreOptions<Bytes>) {
    this.#options = options;
    this.#quotaBytes = options.quotaBytes;
  }

  get quotaBytes(): number {
    return this.#quotaBytes;
  }

  get usedBytes(): number {
    return this.#usedBytes;
  }

  /** What it would take now. */
  get freeBytes(): number {
    const ofHost = this.#options.availableBytes() - reserveBytes;
    return Math.max(0, Math.min(this.#quotaBytes - this.#usedBytes, ofHost));
  }

  /** From now on. What is held already stays until its lease ends. */
  setQuota(bytes: number): void {
    this.#quotaBytes = bytes;
  }

  /** A session of the group begins; false if there are too many groups. */
  attach(name: string, leaseMs: number): boolean {
    const known = this.#groups.get(name);
    if (!known && this.#groups.size >= mostGroups) return false;
    const group = known ?? newGroup<Bytes>();
    group.sessions += 1;
    group.leaseMs = Math.min(Math.max(group.leaseMs, leaseMs), this.#longestLeaseMs);
    this.#groups.set(name, group);
    return true;
  }

  /** The group has the longest lease that there is. */
  prolong(name: string): void {
    const group = this.#groups.get(name);
    if (group) group.leaseMs = this.#longestLeaseMs;
  }

  get #longestLeaseMs(): number {
    return this.#options.longestLeaseMs ?? longestLeaseMs;
  }

  /** A session has ended: from its last one on the lease runs. */
  detach(name: string): void {
    const group = this.#groups.get(name);
    if (!group) return;
    group.sessions -= 1;
    group.expiresAt = this.#options.now() + group.leaseMs;
    if (group.sessions === 0 && group.slabs.size === 0 && group.coming === 0) this.drop(name);
  }

  /**
   * Keeps a copy, of bytes that stay as they are until it answers; false when it is full. The first content of a number
   * stays.
   */
  put(name: string, slab: number, bytes: Uint8Array): boolean | Promise<boolean> {
    const group = this.#groups.get(name);
    if (!group || group.isDropped) return false;
    if (group.slabs.has(slab)) return true;
    if (costOf(bytes) > this.freeBytes) return false;
    const kept = this.#options.shelf.keep(name, bytes);
    if (kept instanceof Promise) return this.#holdLater(group, slab, costOf(bytes), kept);
    this.#hold(group, slab, { kept, groups: 0 });
    return true;
  }

  async #holdLater(
    group: Group<Bytes>,
    slab: number,
    cost: number,
    keeping: Promise<Kept<Bytes>>,
  ): Promise<boolean> {
    // Others are not to take the same room meanwhile.
    this.#usedBytes += cost;
    group.coming += 1;
    const kept = await keeping.catch(() => undefined);
    group.coming -= 1;
    this.#usedBytes -= cost;
    if (!kept || group.isDropped) return false;
    if (group.slabs.has(slab)) this.#waste(group, cost);
    else this.#hold(group, slab, { kept, groups: 0 });
    return true;
  }

  #waste(group: Group<Bytes>, cost: number): void {
    if (!this.#options.shelf.isAppendOnly) return;
    group.wasteBytes += cost;
    this.#usedBytes += cost;
  }

  /**
   * What that other group has under this number is this one's, too: it takes no room, and stays when the other one goes.
   * False when it is not there.
   */
  share(name: string, slab: number, from: string): boolean {
    const group = this.#groups.get(name);
    const held = this.#groups.get(from)?.slabs.get(slab);
    if (!group || group.isDropped || !held) return false;
    if (!group.slabs.has(slab)) this.#hold(group, slab, held);
    return true;
  }

  #hold(group: Group<Bytes>, slab: number, held: Held<Bytes>): void {
    const cost = costOf(held.kept);
    if (held.groups === 0) this.#usedBytes += cost;
    held.groups += 1;
    group.slabs.set(slab, held);
    group.bytes += cost;
    const expected = group.expected.get(slab);
    group.expected.delete(slab);
    for (const onHeld of expected ?? []) onHeld();
  }

  #letGo(group: Group<Bytes>, slab: number, held: Held<Bytes>): void {
    const cost = costOf(held.kept);
    held.groups -= 1;
    if (held.groups === 0) this.#usedBytes -= cost;
    group.slabs.delete(slab);
    group.bytes -= cost;
  }

  /** Calls back once, when the slab is there, perhaps at once. The answer withdraws the wish. */
  whenHeld(name: string, slab: number, onHeld: () => void): () => void {
    const group = this.#groups.get(name);
    if (!group) return () => {};
    if (group.slabs.has(slab)) {
      onHeld();
      return () => {};
    }
    const waiting = group.expected.get(slab) ?? new Set();
    waiting.add(onHeld);
    group.expected.set(slab, waiting);
    return () => {
      waiting.delete(onHeld);
      if (waiting.size === 0 && group.expected.get(slab) === waiting) group.expected.delete(slab);
    };
  }

  /** Forgets one slab, which is not what it should be. */
  remove(name: string, slab: number): void {
    const group = this.#groups.get(name);
    const held = group?.slabs.get(slab);
    if (!group || !held) return;
    this.#letGo(group, slab, held);
    this.#waste(group, costOf(held.kept));
  }

  /** Never changed afterwards. */
  get(name: string, slab: number): Bytes | undefined {
    return this.#groups.get(name)?.slabs.get(slab)?.kept.read();
  }

  /** Forgets what the group holds, for good. */
  drop(name: string): void {
    const group = this.#groups.get(name);
    if (!group) return;
    group.isDropped = true;
    for (const [slab, held] of group.slabs) this.#letGo(group, slab, held);
    this.#usedBytes -= group.wasteBytes;
    group.wasteBytes = 0;
    this.#options.shelf.forget(name);
    if (group.sessions === 0) this.#groups.delete(name);
  }

  /** Forgets the groups whose lease has ended; gives their names. */
  expire(): string[] {
    const now = this.#options.now();
    const over = [...this.#groups].filter(([, group]) => group.sessions === 0 && group.expiresAt <= now);
    for (const [name] of over) this.drop(name);
    return over.map(([name]) => name);
  }

  groups(): Map<string, GroupFacts> {
    const facts = ({ slabs, bytes, wasteBytes, sessions }: Group<Bytes>): GroupFacts => ({
      slabs: slabs.size,
      bytes: bytes + wasteBytes,
      sessions,
    });
    return new Map([...this.#groups].map(([name, group]) => [name, facts(group)]));
  }
}

const costOf = ({ length }: { length: number }): number => length + overheadBytes;

const newGroup = <Bytes>(): Group<Bytes> => ({
  slabs: new Map(),
  coming: 0,
  expected: new Map(),
  bytes: 0,
  wasteBytes: 0,
  sessions: 0,
  leaseMs: 0,
  expiresAt: 0,
  isDropped: false,
});
