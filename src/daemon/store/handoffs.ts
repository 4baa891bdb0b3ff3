/** What this cloudlet has done about the networks of VMs that come and go, so that it is undone after a crash, too. */
import type { Uuid } from '../../model/ids.ts';
import type { HandoffRecord } from '../networks/record.ts';
import type { Database, Statement } from './database.ts';

interface Row {
  record: string;
}

export class HandoffRepository {
  readonly #byId: Statement<Row>;
  readonly #all: Statement<Row>;
  readonly #put: Statement<never>;
  readonly #delete: Statement<never>;

  constructor(database: Database) {
    this.#byId = database.prepare('SELECT record FROM handoffs WHERE id = ?');
    this.#all = database.prepare('SELECT record FROM handoffs ORDER BY id');
    this.#put = database.prepare(
      `INSERT INTO handoffs (id, vm_id, record) VALUES (?, ?, ?)
       ON CONFLICT (id) DO UPDATE SET record = excluded.record`,
    );
    this.#delete = database.prepare('DELETE FROM handoffs WHERE id = ?');
  }

  /** By the id of the migration. */
  get(id: Uuid): HandoffRecord | undefined {
    const row = this.#byId.get(id);
    return row && parse(row);
  }

  all(): HandoffRecord[] {
    return this.#all.all().map(parse);
  }

  /** Inserts or overwrites. */
  put(record: HandoffRecord): void {
    this.#put.run(record.id, record.vmId, JSON.stringify(record));
  }

  delete(id: Uuid): void {
    this.#delete.run(id);
  }
}

const parse = (row: Row): HandoffRecord => JSON.parse(row.record) as HandoffRecord;
