/** Mobile devices that are registered here, or were handed over with their VM. */
import { AppError } from '../../model/errors.ts';
import type { DeviceRecord } from '../../model/follow.ts';
import type { Uuid } from '../../model/ids.ts';
import { type Database, type Statement, violatesUnique } from './database.ts';
import { type Page, type PageRequest, readPage } from './page.ts';

interface Row {
  record: string;
}

export class DeviceRepository {
  readonly #all: Statement<Row>;
  readonly #page: Statement<Row>;
  readonly #put: Statement<never>;
  readonly #delete: Statement<never>;

  constructor(database: Database) {
    this.#all = database.prepare('SELECT record FROM devices ORDER BY created_at, id');
    this.#page = database.prepare(
      'SELECT record FROM devices WHERE (created_at, id) > (?, ?) ORDER BY created_at, id LIMIT ?',
    );
    this.#put = database.prepare(
      `INSERT INTO devices (id, name, created_at, record) VALUES (?, ?, ?, ?)
       ON CONFLICT (id) DO UPDATE SET name = excluded.name, record = excluded.record`,
    );
    this.#delete = database.prepare('DELETE FROM devices WHERE id = ?');
  }

  /** Oldest first. */
  all(): DeviceRecord[] {
    return this.#all.all().map((row) => JSON.parse(row.record) as DeviceRecord);
  }

  /** Oldest first. */
  list(request: PageRequest): Page<DeviceRecord> {
    const parse = (row: Row) => JSON.parse(row.record) as DeviceRecord;
    const positionOf = (row: Row): [string, string] => [parse(row).createdAt, parse(row).id];
    return readPage(this.#page, request, positionOf, parse);
  }

  /** Inserts or overwrites. Errors: `name_taken`. */
  put(device: DeviceRecord): void {
    const { id, name, createdAt } = device;
    try {
      this.#put.run(id, name, createdAt, JSON.stringify(device));
    } catch (error) {
      if (!violatesUnique(error, 'devices.name')) throw error;
      throw new AppError('name_taken', `There is a device '${name}' already`, { kind: 'device', name });
    }
  }

  delete(id: Uuid): void {
    this.#delete.run(id);
  }
}
