/** Single facts that need no table of their own, by key. */
import type { Database, Statement } from './database.ts';

export class MetaRepository {
  readonly #get: Statement<{ value: string }>;
  readonly #set: Statement<never>;

  constructor(database: Database) {
    this.#get = database.prepare('SELECT value FROM meta WHERE key = ?');
    this.#set = database.prepare(
      'INSERT INTO meta (key, value) VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value',
    );
  }

  get(key: string): string | undefined {
    return this.#get.get(key)?.value;
  }

  set(key: string, value: string): void {
    this.#set.run(key, value);
  }
}
