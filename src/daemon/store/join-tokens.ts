/** Rights to join the fleet. Each is used at most once. */

import type { JoinTokenRecord } from '../../model/fleet.ts';
import type { Uuid } from '../../model/ids.ts';
import type { Database, Statement } from './database.ts';

interface Row {
  id: string;
  secret_hash: string;
  created_at: string;
  expires_at: string;
  used_at: string | null;
  used_by: string | null;
}

export class JoinTokenRepository {
  readonly #byHash: Statement<Row>;
  readonly #insert: Statement<never>;
  readonly #use: Statement<never>;
  readonly #deleteExpired: Statement<never>;

  constructor(database: Database) {
    this.#byHash = database.prepare('SELECT * FROM join_tokens WHERE secret_hash = ?');
    this.#insert = database.prepare(
      'INSERT INTO join_tokens (id, secret_hash, created_at, expires_at) VALUES (?, ?, ?, ?)',
    );
    this.#use = database.prepare(
      'UPDATE join_tokens SET used_at = ?, used_by = ? WHERE id = ? AND used_at IS NULL',
    );
    this.#deleteExpired = database.prepare('DELETE FROM join_tokens WHERE expires_at < ?');
  }

  getByHash(secretHash: string): JoinTokenRecord | undefined {
    const row = this.#byHash.get(secretHash);
    return row && parse(row);
  }

  insert(token: JoinTokenRecord): void {
    this.#insert.run(token.id, token.secretHash, token.createdAt, token.expiresAt);
  }

  /** False if it was used before: of two who try, one wins. */
  use(id: Uuid, by: Uuid, at: string): boolean {
    return this.#use.run(at, by, id).changes === 1;
  }

  deleteExpired(before: string): void {
    this.#deleteExpired.run(before);
  }
}

const parse = (row: Row): JoinTokenRecord => ({
  id: row.id,
  secretHash: row.secret_hash,
  createdAt: row.created_at,
  expiresAt: row.expires_at,
  ...(row.used_at === null ? {} : { usedAt: row.used_at }),
  ...(row.used_by === null ? {} : { usedBy: row.used_by }),
});
