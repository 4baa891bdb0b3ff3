/** Migrations from and to this cloudlet: the journal of those that run, the history of those that have ended. */
import type { Uuid } from '../../model/ids.ts';
import type { MigrationRecord } from '../migrations/record.ts';
import type { Database, Statement } from './database.ts';
import { type Page, type PageRequest, readPage } from './page.ts';

interface Row {
  record: string;
}

export class MigrationRepository {
  readonly #byId: Statement<Row>;
  readonly #unfinished: Statement<Row>;
  readonly #latest: Statement<Row>;
  readonly #lastOf: Statement<Row>;
  readonly #page: Statement<Row>;
  readonly #put: Statement<never>;
  readonly #delete: Statement<never>;

  constructor(database: Database) {
    this.#byId = database.prepare('SELECT record FROM migrations WHERE id = ?');
    this.#unfinished = database.prepare(
      'SELECT record FROM migrations WHERE finished_at IS NULL ORDER BY created_at',
    );
    this.#latest = database.prepare(
      'SELECT record FROM migrations ORDER BY created_at DESC, id DESC LIMIT ?',
    );
    this.#lastOf = database.prepare(
      'SELECT record FROM migrations WHERE vm_id = ? ORDER BY created_at DESC, id DESC LIMIT 1',
    );
    this.#page = database.prepare(
      'SELECT record FROM migrations WHERE (created_at, id) > (?, ?) ORDER BY created_at, id LIMIT ?',
    );
    this.#put = database.prepare(
      `INSERT INTO migrations (id, vm_id, created_at, finished_at, record) VALUES (?, ?, ?, ?, ?)
       ON CONFLICT (id) DO UPDATE SET finished_at = excluded.finished_at, record = excluded.record`,
    );
    this.#delete = database.prepare('DELETE FROM migrations WHERE id = ?');
  }

  get(id: Uuid): MigrationRecord | undefined {
    const row = this.#byId.get(id);
    return row && parse(row);
  }

  /** Those that a daemon that starts goes on with, oldest first. */
  unfinished(): MigrationRecord[] {
    return this.#unfinished.all().map(parse);
  }

  /** The last one of a VM, from here or to here. */
  lastOf(vmId: Uuid): MigrationRecord | undefined {
    const row = this.#lastOf.get(vmId);
    return row && parse(row);
  }

  /** The last ones, oldest first. */
  latest(limit: number): MigrationRecord[] {
    return this.#latest.all(limit).map(parse).reverse();
  }

  /** Oldest first. */
  list(request: PageRequest): Page<MigrationRecord> {
    const position = (row: Row): [string, string] => {
      const { createdAt, id } = parse(row);
      return [createdAt, id];
    };
    return readPage(this.#page, request, position, parse);
  }

  /** Inserts or overwrites; it is on the disk afterwards. */
  put(record: MigrationRecord): void {
    const { id, vm, createdAt, finishedAt } = record;
    this.#put.run(id, vm.id, createdAt, finishedAt ?? null, JSON.stringify(record));
  }

  delete(id: Uuid): void {
    this.#delete.run(id);
  }
}

const parse = (row: Row): MigrationRecord => JSON.parse(row.record) as MigrationRecord;
