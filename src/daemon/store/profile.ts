/** What finished migrations came to, for forecasts: our own and those that peers told of. */
import type { ProfileSample } from '../../model/follow.ts';
import type { Database, Statement } from './database.ts';

interface Row {
  record: string;
}

export class ProfileRepository {
  readonly #latest: Statement<Row>;
  readonly #put: Statement<never>;
  readonly #prune: Statement<never>;

  constructor(database: Database) {
    this.#latest = database.prepare('SELECT record FROM profile ORDER BY at DESC LIMIT ?');
    this.#put = database.prepare(
      `INSERT INTO profile (migration_id, at, record) VALUES (?, ?, ?)
       ON CONFLICT (migration_id) DO UPDATE SET record = excluded.record`,
    );
    this.#prune = database.prepare(
      'DELETE FROM profile WHERE migration_id IN (SELECT migration_id FROM profile ORDER BY at DESC LIMIT -1 OFFSET ?)',
    );
  }

  /** The newest ones, oldest first. */
  latest(limit: number): ProfileSample[] {
    return this.#latest
      .all(limit)
      .map((row) => JSON.parse(row.record) as ProfileSample)
      .reverse();
  }

  /** Keeps a sample, and the newest `keep` in all. */
  put(sample: ProfileSample, keep: number): void {
    this.#put.run(sample.migrationId, sample.at, JSON.stringify(sample));
    this.#prune.run(keep);
  }
}
