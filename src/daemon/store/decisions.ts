/** Decisions about where VMs should be. The oldest go, beyond a bound. */
import type { Decision } from '../../model/follow.ts';
import type { Uuid } from '../../model/ids.ts';
import type { Database, Statement } from './database.ts';
import { type Page, type PageRequest, readPage } from './page.ts';

interface Row {
  record: string;
}

const kept = 5000;

export class DecisionRepository {
  readonly #byId: Statement<Row>;
  readonly #page: Statement<Row>;
  readonly #put: Statement<never>;
  readonly #prune: Statement<never>;
  #sincePrune = 0;

  constructor(database: Database) {
    this.#byId = database.prepare('SELECT record FROM decisions WHERE id = ?');
    this.#page = database.prepare(
      'SELECT record FROM decisions WHERE (created_at, id) > (?, ?) ORDER BY created_at, id LIMIT ?',
    );
    this.#put = database.prepare(
      `INSERT INTO decisions (id, vm_id, created_at, record) VALUES (?, ?, ?, ?)
       ON CONFLICT (id) DO UPDATE SET record = excluded.record`,
    );
    this.#prune = database.prepare(
      'DELETE FROM decisions WHERE id IN (SELECT id FROM decisions ORDER BY created_at DESC, id DESC LIMIT -1 OFFSET ?)',
    );
  }

  get(id: Uuid): Decision | undefined {
    const row = this.#byId.get(id);
    return row && parse(row);
  }

  /** Oldest first. */
  list(request: PageRequest): Page<Decision> {
    return readPage(this.#page, request, positionOf, parse);
  }

  put(decision: Decision): void {
    this.#put.run(decision.id, decision.vm.id, decision.at, JSON.stringify(decision));
    this.#sincePrune += 1;
    if (this.#sincePrune < 100) return;
    this.#sincePrune = 0;
    this.#prune.run(kept);
  }
}

const parse = (row: Row): Decision => JSON.parse(row.record) as Decision;

function positionOf(row: Row): [string, string] {
  const { at, id } = parse(row);
  return [at, id];
}
