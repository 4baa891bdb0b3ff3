/** What this cloudlet keeps for VMs of others: one row for each migration, which alone decides who may go on with the VM. */
import type { Uuid } from '../../model/ids.ts';
import type { EscrowRecord } from '../escrow/record.ts';
import type { Database, Statement } from './database.ts';

interface Row {
  record: string;
}

export class EscrowRepository {
  readonly #byId: Statement<Row>;
  readonly #all: Statement<Row>;
  readonly #put: Statement<never>;
  readonly #prune: Statement<never>;

  constructor(database: Database) {
    this.#byId = database.prepare('SELECT record FROM escrows WHERE migration_id = ?');
    this.#all = database.prepare('SELECT record FROM escrows ORDER BY created_at, migration_id');
    this.#put = database.prepare(
      `INSERT INTO escrows (migration_id, created_at, record) VALUES (?, ?, ?)
       ON CONFLICT (migration_id) DO UPDATE SET record = excluded.record`,
    );
    this.#prune = database.prepare(
      `DELETE FROM escrows WHERE created_at < ? AND json_extract(record, '$.state') IN ('held', 'released')`,
    );
  }

  get(migrationId: Uuid): EscrowRecord | undefined {
    const row = this.#byId.get(migrationId);
    return row && parse(row);
  }

  /** Oldest first. */
  all(): EscrowRecord[] {
    return this.#all.all().map(parse);
  }

  /** Inserts or overwrites; it is on the disk afterwards. */
  put(record: EscrowRecord): void {
    this.#put.run(record.migrationId, record.createdAt, JSON.stringify(record));
  }

  /** Forgets those from before that time that were not claimed. */
  prune(before: string): void {
    this.#prune.run(before);
  }
}

const parse = (row: Row): EscrowRecord => JSON.parse(row.record) as EscrowRecord;
