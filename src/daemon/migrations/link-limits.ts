/**
 * How fast bytes may leave for other cloudlets: all migrations together, and each by its own limit. The VMs that move
 * at one time take turns, so they share what there is in equal parts, whatever number of sessions each has.
 */
import { RateLimiter, type SharedLimits } from '../../link/index.ts';
import type { Uuid } from '../../model/ids.ts';
import type { MigrationLimits } from '../../model/migration.ts';
import type { Store } from '../store/index.ts';

const metaKey = 'migrationBandwidthBps';
const unlimited = 'none';
/** What is sent within the life of anybody is nothing. */
const pausedBps = 1;

export class LinkLimits {
  readonly #store: Pick<Store, 'meta'>;
  readonly #cloudlet: RateLimiter;
  readonly #byMigration = new Map<Uuid, RateLimiter>();

  /** `configuredBps` holds until somebody sets another one, which outlives the daemon. */
  constructor(store: Pick<Store, 'meta'>, configuredBps: number | undefined) {
    this.#store = store;
    const set = store.meta.get(metaKey);
    const bps = set === undefined ? configuredBps : set === unlimited ? undefined : Number(set);
    this.#cloudlet = new RateLimiter(bps ?? null);
  }

  /** Of all migrations from here together, in bits per second; null for no limit. */
  get cloudletBps(): number | null {
    return this.#cloudlet.rateBps;
  }

  /** From now on, also for those at work. */
  setCloudlet(bps: number | null): void {
    this.#store.meta.set(metaKey, bps === null ? unlimited : String(bps));
    this.#cloudlet.setRate(bps);
  }

  /** Of one VM: its disk, its memory and its image together. */
  setMigration(id: Uuid, { bandwidthBps, paused }: Pick<MigrationLimits, 'bandwidthBps' | 'paused'>): void {
    this.#limiterOf(id).setRate(paused ? pausedBps : (bandwidthBps ?? null));
  }

  /** For a session of the migration. */
  of(id: Uuid): SharedLimits {
    const own = this.#limiterOf(id);
    return { limiters: [own, this.#cloudlet], party: own };
  }

  /** It is over. */
  forget(id: Uuid): void {
    this.#byMigration.delete(id);
  }

  #limiterOf(id: Uuid): RateLimiter {
    const limiter = this.#byMigration.get(id) ?? new RateLimiter(null);
    this.#byMigration.set(id, limiter);
    return limiter;
  }
}
