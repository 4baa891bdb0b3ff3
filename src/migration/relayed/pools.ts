/** Which VMs share a pool: those of one tenant that are on their way to the same place. One of no known tenant shares nothing. */
import { newId, type Uuid } from '../../model/ids.ts';
import { Pool } from './pool.ts';

export class Pools {
  readonly #pools = new Map<string, Pool>();

  /** For a divider that joins it at once. */
  of(tenant: string | undefined, destinationId: Uuid): Pool | undefined {
    if (tenant === undefined) return undefined;
    const key = `${destinationId} ${tenant}`;
    const known = this.#pools.get(key);
    if (known) return known;
    const pool = new Pool(newId(), () => this.#pools.delete(key));
    this.#pools.set(key, pool);
    return pool;
  }
}
