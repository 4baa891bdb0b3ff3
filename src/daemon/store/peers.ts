/**
 * The other cloudlets. A removed one stays as a mark, so that what other cloudlets still tell of it does not bring
 * it back; only being admitted again does.
 */
import type { Peer } from '../../model/fleet.ts';
import type { Uuid } from '../../model/ids.ts';
import type { Database, Statement } from './database.ts';

interface Row {
  record: string;
  removed_at: string | null;
}

export class PeerRepository {
  readonly #all: Statement<Row>;
  readonly #put: Statement<never>;
  readonly #remove: Statement<never>;

  constructor(database: Database) {
    this.#all = database.prepare('SELECT record, removed_at FROM peers ORDER BY name, id');
    this.#put = database.prepare(
      `INSERT INTO peers (id, name, joined_at, record) VALUES (?, ?, ?, ?) ON CONFLICT (id)
       DO UPDATE SET name = excluded.name, record = excluded.record, removed_at = NULL`,
    );
    this.#remove = database.prepare('UPDATE peers SET removed_at = ? WHERE id = ? AND removed_at IS NULL');
  }

  /** Every peer ever known, by name; `removed` tells those that were put out. */
  all(): { peer: Peer; removed: boolean }[] {
    return this.#all
      .all()
      .map((row) => ({ peer: JSON.parse(row.record) as Peer, removed: row.removed_at !== null }));
  }

  /** Inserts or overwrites, and takes a removal back. */
  put(peer: Peer): void {
    this.#put.run(peer.id, peer.name, peer.joinedAt, JSON.stringify(peer));
  }

  /** False if it was not there or removed already. */
  remove(id: Uuid, at: string): boolean {
    return this.#remove.run(at, id).changes === 1;
  }
}
