/** What was measured of the way to each peer, so that a daemon that starts need not begin anew. */
import type { Neighbour } from '../../follow/index.ts';
import type { Uuid } from '../../model/ids.ts';
import type { Database, Statement } from './database.ts';

export class NeighbourRepository {
  readonly #all: Statement<{ record: string }>;
  readonly #put: Statement<never>;
  readonly #delete: Statement<never>;

  constructor(database: Database) {
    this.#all = database.prepare('SELECT record FROM neighbours');
    this.#put = database.prepare(
      'INSERT INTO neighbours (id, record) VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET record = excluded.record',
    );
    this.#delete = database.prepare('DELETE FROM neighbours WHERE id = ?');
  }

  all(): Neighbour[] {
    return this.#all.all().map(({ record }) => {
      const neighbour = JSON.parse(record) as Neighbour;
      // JSON has no infinity, which is the least RTT of a peer that never answered.
      const { minMs } = neighbour.rtt;
      return { ...neighbour, rtt: { ...neighbour.rtt, minMs: minMs ?? Number.POSITIVE_INFINITY } };
    });
  }

  put(neighbour: Neighbour): void {
    this.#put.run(neighbour.cloudletId, JSON.stringify(neighbour));
  }

  delete(id: Uuid): void {
    this.#delete.run(id);
  }
}
