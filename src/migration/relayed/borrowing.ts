/**
 * At the source: a slab that another VM of the pool has put on relays is *borrowed* where this one has the same content:
 * relays that hold it are asked to hold it for this one as well, and say so to this one. From then on it is as a slab of
 * its own, but that nothing of it had to leave. One that does not come, or not soon, the source sends itself.
 */
import type { Pool, PooledSlab } from './pool.ts';
import type { RelayEnds } from './relay-ends.ts';
import { within } from './within.ts';

/** Slabs that it waits for. */
const mostWaiting = 512;
/** A relay that has not answered by then does not count. */
const slowMs = 4000;

export interface BorrowingOptions {
  pool: Pool;
  /** Of this VM. */
  group: string;
  relays: RelayEnds;
  /** How many relays are to hold each slab. */
  replicas: number;
  /** For a slab that is not with relays yet. */
  patienceMs: number;
  /** Nobody needs it any more. */
  isEnded: () => boolean;
  /** So many relays hold it for this VM now. */
  onHeld: (slab: number, pooled: PooledSlab, holders: Set<number>) => void;
  /** It is not to be had. */
  onFailed: (slab: number) => void;
  /** One is waited for no longer. */
  onOver: () => void;
}

export class Borrowing {
  readonly #options: BorrowingOptions;
  /** Relays were asked for them: once, whatever came of it. */
  readonly #begun = new Set<number>();
  #waiting = 0;

  constructor(options: BorrowingOptions) {
    this.#options = options;
  }

  get hasRoom(): boolean {
    return this.#waiting < mostWaiting;
  }

  /** It waits for nothing. */
  get isSettled(): boolean {
    return this.#waiting === 0;
  }

  /** Whether it is a slab of another VM. */
  has(slab: number): boolean {
    return this.#begun.has(slab);
  }

  /** Whether relays are asked for it now: it is another VM's, and was not asked for before. */
  begin(slab: number): boolean {
    const { pool, group, relays, replicas, onFailed, onOver } = this.#options;
    if (this.#begun.has(slab) || relays.sharing.length < replicas) return false;
    const placed = pool.ofOthers(slab, group);
    if (!placed) return false;
    this.#begun.add(slab);
    this.#waiting += 1;
    this.#takeShare(slab, placed)
      .catch(() => false)
      .then((isHeld) => {
        if (!isHeld) onFailed(slab);
      })
      .finally(() => {
        this.#waiting -= 1;
        onOver();
      });
    return true;
  }

  /** Whether as many relays as wanted hold it for this VM now. */
  async #takeShare(slab: number, placing: Promise<PooledSlab | undefined>): Promise<boolean> {
    const { pool, relays, replicas, patienceMs, isEnded, onHeld } = this.#options;
    const pooled = await within(patienceMs, placing);
    if (!pooled || isEnded()) return false;
    const asked = relays.sharing.filter((relay) => pooled.relays.includes(relays.idOf(relay)));
    if (asked.length < replicas) return false;
    const holders = new Set<number>();
    await Promise.all(
      asked.map(async (relay) => {
        const sharing = relays
          .client(relay)
          .share(slab, pooled.group)
          .catch(() => false);
        if (await within(slowMs, sharing)) holders.add(relay);
      }),
    );
    if (relays.aliveOf(holders) < replicas) {
      pool.lose(slab);
      return false;
    }
    onHeld(slab, pooled, holders);
    return true;
  }
}
