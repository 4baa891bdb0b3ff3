/**
 * Events, numbered by SQLite's AUTOINCREMENT, so that an id is never used again even after its row is gone.
 *
 * An event with `latestOf` replaces the earlier one with the same key: of a thousand progress reports only the last
 * is worth keeping. The number of rows is bounded; `prunedThrough` says up to which id rows fell to that bound.
 */
import type { EventRecord } from '../../model/operation.ts';
import type { Database, Statement } from './database.ts';
import type { MetaRepository } from './meta.ts';

export interface NewEvent {
  kind: string;
  vmId?: string | undefined;
  data: Record<string, unknown>;
  /** The event takes the place of the one before with the same key. */
  latestOf?: string | undefined;
}

interface Row {
  id: number;
  at: string;
  kind: string;
  vm_id: string | null;
  data: string;
}

const prunedKey = 'events.prunedThrough';
/** Rows beyond the bound before the oldest are removed, so that not every append pays for it. */
const PRUNE_STEP = 100;

export class EventRepository {
  readonly #meta: MetaRepository;
  readonly #keep: number;
  readonly #since: Statement<Row>;
  readonly #lastId: Statement<{ seq: number }>;
  readonly #count: Statement<{ count: number }>;
  readonly #oldest: Statement<{ id: number }>;
  readonly #insert: Statement<never>;
  readonly #replace: Statement<never>;
  readonly #deleteThrough: Statement<never>;
  #appendsSincePrune = 0;

  constructor(database: Database, meta: MetaRepository, keep: number) {
    this.#meta = meta;
    this.#keep = keep;
    this.#since = database.prepare(
      'SELECT id, at, kind, vm_id, data FROM events WHERE id > ? ORDER BY id LIMIT ?',
    );
    this.#lastId = database.prepare("SELECT seq FROM sqlite_sequence WHERE name = 'events'");
    this.#count = database.prepare('SELECT count(*) AS count FROM events');
    this.#oldest = database.prepare('SELECT id FROM events ORDER BY id LIMIT 1 OFFSET ?');
    this.#insert = database.prepare(
      'INSERT INTO events (at, kind, vm_id, latest_of, data) VALUES (?, ?, ?, ?, ?)',
    );
    this.#replace = database.prepare('DELETE FROM events WHERE latest_of = ?');
    this.#deleteThrough = database.prepare('DELETE FROM events WHERE id <= ?');
  }

  /** Call it in a transaction: it writes several rows. */
  append(event: NewEvent, at: string): EventRecord {
    const { kind, vmId, data, latestOf } = event;
    if (latestOf !== undefined) this.#replace.run(latestOf);
    const { lastInsertRowid } = this.#insert.run(
      at,
      kind,
      vmId ?? null,
      latestOf ?? null,
      JSON.stringify(data),
    );
    this.#appendsSincePrune += 1;
    if (this.#appendsSincePrune >= PRUNE_STEP) this.#prune();
    return { id: Number(lastInsertRowid), at, kind, ...(vmId === undefined ? {} : { vmId }), data };
  }

  /** Up to `limit` events with a greater id, in order. */
  since(id: number, limit: number): EventRecord[] {
    return this.#since.all(id, limit).map(parse);
  }

  /** The greatest id ever given; 0 before the first. */
  lastId(): number {
    return this.#lastId.get()?.seq ?? 0;
  }

  /** Events up to this id may be gone although nothing replaced them; 0 if none are. */
  prunedThrough(): number {
    return Number(this.#meta.get(prunedKey) ?? 0);
  }

  #prune(): void {
    this.#appendsSincePrune = 0;
    const surplus = this.#count.get()!.count - this.#keep;
    if (surplus <= 0) return;
    const { id } = this.#oldest.get(surplus - 1)!;
    this.#deleteThrough.run(id);
    this.#meta.set(prunedKey, String(id));
  }
}

const parse = (row: Row): EventRecord => ({
  id: row.id,
  at: row.at,
  kind: row.kind,
  ...(row.vm_id === null ? {} : { vmId: row.vm_id }),
  data: JSON.parse(row.data) as Record<string, unknown>,
});
