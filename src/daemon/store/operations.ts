/** The journal of operations. Finished ones are kept up to a bound, the oldest go first. */
import type { Uuid } from '../../model/ids.ts';
import type { Operation, OperationKind } from '../../model/operation.ts';
import type { Database, Statement } from './database.ts';
import { type Page, type PageRequest, readPage } from './page.ts';

interface Row {
  record: string;
}

export class OperationRepository {
  readonly #byId: Statement<Row>;
  readonly #page: Statement<Row>;
  readonly #running: Statement<Row>;
  readonly #latestSucceeded: Statement<Row>;
  readonly #insert: Statement<never>;
  readonly #update: Statement<never>;
  readonly #prune: Statement<never>;

  constructor(database: Database) {
    this.#byId = database.prepare('SELECT record FROM operations WHERE id = ?');
    this.#page = database.prepare(
      'SELECT record FROM operations WHERE (created_at, id) > (?, ?) ORDER BY created_at, id LIMIT ?',
    );
    this.#running = database.prepare("SELECT record FROM operations WHERE state = 'running'");
    this.#latestSucceeded = database.prepare(
      `SELECT record FROM operations WHERE state = 'succeeded' AND record ->> 'kind' = ?
       ORDER BY created_at DESC, id DESC LIMIT ?`,
    );
    this.#insert = database.prepare(
      'INSERT INTO operations (id, state, created_at, record) VALUES (?, ?, ?, ?)',
    );
    this.#update = database.prepare('UPDATE operations SET state = ?, record = ? WHERE id = ?');
    this.#prune = database.prepare(
      `DELETE FROM operations WHERE state <> 'running' AND id IN
       (SELECT id FROM operations ORDER BY created_at DESC, id DESC LIMIT -1 OFFSET ?)`,
    );
  }

  get(id: Uuid): Operation | undefined {
    const row = this.#byId.get(id);
    return row && parse(row);
  }

  /** Oldest first. */
  list(request: PageRequest): Page<Operation> {
    return readPage(this.#page, request, positionOf, parse);
  }

  /** The newest of a kind that have succeeded. */
  latestSucceeded(kind: OperationKind, limit: number): Operation[] {
    return this.#latestSucceeded.all(kind, limit).map(parse);
  }

  insert(operation: Operation): void {
    this.#insert.run(operation.id, operation.state, operation.createdAt, JSON.stringify(operation));
  }

  update(operation: Operation): void {
    this.#update.run(operation.state, JSON.stringify(operation), operation.id);
  }

  /** Forgets the oldest finished operations beyond the newest `keep`. */
  prune(keep: number): void {
    this.#prune.run(keep);
  }

  /**
   * Ends what a daemon that died had left running, and gives those operations. Call it once after opening,
   * before any operation starts.
   */
  interruptRunning(at: string): Operation[] {
    return this.#running.all().map((row) => {
      const operation: Operation = {
        ...parse(row),
        state: 'failed',
        error: {
          code: 'interrupted',
          message: 'The daemon stopped while the operation was running.',
          details: {},
        },
        finishedAt: at,
      };
      this.update(operation);
      return operation;
    });
  }
}

const parse = (row: Row): Operation => JSON.parse(row.record) as Operation;

function positionOf(row: Row): [string, string] {
  const { createdAt, id } = parse(row);
  return [createdAt, id];
}
