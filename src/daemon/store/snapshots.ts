/** Golden snapshots. The name is unique; the image of each must be in the store. */
import { AppError } from '../../model/errors.ts';
import type { Uuid } from '../../model/ids.ts';
import type { SnapshotRecord } from '../../model/vm.ts';
import { type Database, type Statement, violatesUnique } from './database.ts';
import { type Page, type PageRequest, readPage } from './page.ts';

interface Row {
  record: string;
}

export class SnapshotRepository {
  readonly #byId: Statement<Row>;
  readonly #byName: Statement<Row>;
  readonly #page: Statement<Row>;
  readonly #insert: Statement<never>;
  readonly #update: Statement<never>;
  readonly #all: Statement<Row>;
  readonly #delete: Statement<never>;

  constructor(database: Database) {
    this.#byId = database.prepare('SELECT record FROM snapshots WHERE id = ?');
    this.#byName = database.prepare('SELECT record FROM snapshots WHERE name = ?');
    this.#page = database.prepare(
      'SELECT record FROM snapshots WHERE (created_at, id) > (?, ?) ORDER BY created_at, id LIMIT ?',
    );
    this.#insert = database.prepare(
      'INSERT INTO snapshots (id, name, created_at, image, record) VALUES (?, ?, ?, ?, ?)',
    );
    this.#update = database.prepare('UPDATE snapshots SET record = ? WHERE id = ?');
    this.#all = database.prepare('SELECT record FROM snapshots ORDER BY created_at, id');
    this.#delete = database.prepare('DELETE FROM snapshots WHERE id = ?');
  }

  get(id: Uuid): SnapshotRecord | undefined {
    const row = this.#byId.get(id);
    return row && parse(row);
  }

  getByName(name: string): SnapshotRecord | undefined {
    const row = this.#byName.get(name);
    return row && parse(row);
  }

  /** By id or by name; an id goes first. */
  find(reference: string): SnapshotRecord | undefined {
    return this.get(reference) ?? this.getByName(reference);
  }

  /** Oldest first. */
  list(request: PageRequest): Page<SnapshotRecord> {
    const records = readPage(
      this.#page,
      request,
      (row) => {
        const { createdAt, id } = parse(row);
        return [createdAt, id];
      },
      parse,
    );
    return records;
  }

  /** Errors: `name_taken`. */
  insert(snapshot: SnapshotRecord): void {
    const { id, name, createdAt, spec } = snapshot;
    try {
      this.#insert.run(id, name, createdAt, spec.disk.image, JSON.stringify(snapshot));
    } catch (error) {
      if (!violatesUnique(error, 'snapshots.name')) throw error;
      throw new AppError('name_taken', `Cannot name a snapshot ${name}: another one has that name.`, {
        kind: 'snapshot',
        name,
      });
    }
  }

  /** Oldest first. */
  all(): SnapshotRecord[] {
    return this.#all.all().map(parse);
  }

  /** What it is called and stands on stays. */
  update(snapshot: SnapshotRecord): void {
    this.#update.run(JSON.stringify(snapshot), snapshot.id);
  }

  /** False if there was none. */
  delete(id: Uuid): boolean {
    return this.#delete.run(id).changes === 1;
  }
}

const parse = (row: Row): SnapshotRecord => JSON.parse(row.record) as SnapshotRecord;
