/**
 * What a relay holds: sealed slabs in memory, by group (one migration of one source) and number. Nothing is reserved:
 * a slab is taken while there is room at that moment. Groups may share slabs, which then are held as long as one of them
 * has them. Pure but for the two functions it is given.
 *
 * Invariants: the bytes held never exceed the quota that held when the last of them was taken; a group outlives its
 * last session by its lease and no more.
 */
export interface SlabStoreOptions {
  /** Bytes that it may hold; 0 takes nothing. */
  quotaBytes: number;
  /** What the host could give beside that now. */
  availableBytes: () => number;
  /** In ms. */
  now: () => number;
}

export interface GroupFacts {
  slabs: number;
  bytes: number;
  sessions: number;
}

interface Held {
  bytes: Buffer;
  /** How many have it. */
  groups: number;
}

interface Group {
  slabs: Map<number, Held>;
  /** Told when a slab is there. */
  expected: Map<number, Set<() => void>>;
  /** Of its slabs, whoever else has them. */
  bytes: number;
  sessions: number;
  leaseMs: number;
  expiresAt: number;
  /** Nothing is taken any more: what another relay still gives on comes too late. */
  isDropped: boolean;
}

/** What a slab costs beside its bytes, about. */
const overheadBytes = 256;
/** So much of the host's memory is never lent: a relay has VMs of its own. */
const reserveBytes = 256 * 1024 * 1024;
const mostGroups = 256;
export const longestLeaseMs = 3_600_000;

export class SlabStore {
  readonly #options: SlabStoreOptions;
  readonly #groups = new Map<string, Group>();
  #quotaBytes: number;
  #usedBytes = 0;

  constructor(options: SlabStoreOptions) {
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
    const group = known ?? newGroup();
    group.sessions += 1;
    group.leaseMs = Math.min(Math.max(group.leaseMs, leaseMs), longestLeaseMs);
    this.#groups.set(name, group);
    return true;
  }

  /** A session has ended: from its last one on the lease runs. */
  detach(name: string): void {
    const group = this.#groups.get(name);
    if (!group) return;
    group.sessions -= 1;
    group.expiresAt = this.#options.now() + group.leaseMs;
    if (group.sessions === 0 && group.slabs.size === 0) this.#groups.delete(name);
  }

  /** Keeps a copy; false when it is full. The first content of a number stays. */
  put(name: string, slab: number, bytes: Uint8Array): boolean {
    const group = this.#groups.get(name);
    if (!group || group.isDropped) return false;
    if (group.slabs.has(slab)) return true;
    if (costOf({ bytes }) > this.freeBytes) return false;
    // A buffer of its own: one out of Node's pool would keep 64 KiB alive for it.
    const copy = Buffer.allocUnsafeSlow(bytes.length);
    copy.set(bytes);
    this.#hold(group, slab, { bytes: copy, groups: 0 });
    return true;
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

  #hold(group: Group, slab: number, held: Held): void {
    const cost = costOf(held);
    if (held.groups === 0) this.#usedBytes += cost;
    held.groups += 1;
    group.slabs.set(slab, held);
    group.bytes += cost;
    const expected = group.expected.get(slab);
    group.expected.delete(slab);
    for (const onHeld of expected ?? []) onHeld();
  }

  #letGo(group: Group, slab: number, held: Held): void {
    const cost = costOf(held);
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
    if (group && held) this.#letGo(group, slab, held);
  }

  /** Never changed afterwards. */
  get(name: string, slab: number): Buffer | undefined {
    return this.#groups.get(name)?.slabs.get(slab)?.bytes;
  }

  /** Forgets what the group holds, for good. */
  drop(name: string): void {
    const group = this.#groups.get(name);
    if (!group) return;
    group.isDropped = true;
    for (const [slab, held] of group.slabs) this.#letGo(group, slab, held);
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
    const facts = ({ slabs, bytes, sessions }: Group): GroupFacts => ({ slabs: slabs.size, bytes, sessions });
    return new Map([...this.#groups].map(([name, group]) => [name, facts(group)]));
  }
}

const costOf = ({ bytes }: { bytes: Uint8Array }): number => bytes.length + overheadBytes;

const newGroup = (): Group => ({
  slabs: new Map(),
  expected: new Map(),
  bytes: 0,
  sessions: 0,
  leaseMs: 0,
  expiresAt: 0,
  isDropped: false,
});
