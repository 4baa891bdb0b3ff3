/** What the store keeps of the migrations of this cloudlet: the journal of those at work, the history of the others. */
import type { Merged } from '../../migration/protocol.ts';
import { AppError } from '../../model/errors.ts';
import type { Uuid } from '../../model/ids.ts';
import type { Store } from '../store/index.ts';
import { holdForFault } from './fault.ts';
import type { MigrationRecord } from './record.ts';

export class MigrationJournal {
  readonly #store: Store;
  readonly #onFinished: (record: MigrationRecord) => void;

  constructor(store: Store, onFinished: (record: MigrationRecord) => void = () => {}) {
    this.#store = store;
    this.#onFinished = onFinished;
  }

  /** Writes the state before anything of it is done; `first` is the record if there is none yet. */
  append<R extends MigrationRecord>(first: R, state: R['state']): Promise<void> | undefined {
    this.update(first.id, (known) => ({ ...(known ?? first), state }) as MigrationRecord);
    return holdForFault(first.role, state.name);
  }

  update(id: Uuid, change: (known: MigrationRecord | undefined) => MigrationRecord): void {
    this.#store.migrations.put(change(this.#store.migrations.get(id)));
  }

  /** What only a human can settle, or may forget about: `undefined` when it has settled itself. */
  noteAttention(id: Uuid, attention: string | undefined): void {
    const known = this.get(id);
    if (!known || known.attention === attention) return;
    const { attention: _before, ...record } = known;
    const noted = attention === undefined ? record : { ...record, attention };
    this.#store.migrations.put(noted as MigrationRecord);
  }

  get(id: Uuid): MigrationRecord | undefined {
    return this.#store.migrations.get(id);
  }

  require(id: Uuid): MigrationRecord {
    const record = this.get(id);
    if (record) return record;
    throw new AppError('not_found', `There is no migration ${id}`, { kind: 'migration', name: id });
  }

  /** At rest for good: what is written from now on is history. */
  finish(id: Uuid, facts: Pick<MigrationRecord, 'progress' | 'result'> = {}): void {
    const record = this.require(id);
    // One that answers a late question comes to its end again, and has measured nothing this time.
    if (record.finishedAt) return;
    const finished = { ...record, ...facts, finishedAt: new Date().toISOString() } as MigrationRecord;
    this.#store.migrations.put(finished);
    this.#onFinished(finished);
  }

  /** The destination has all of the VM, which had left here before. */
  merged(id: Uuid, { merge, cost }: Merged): void {
    const record = this.get(id);
    if (!record?.result) return;
    const totalMs = Date.now() - Date.parse(record.createdAt);
    const result = { ...record.result, totalMs, merge, ...(cost ? { destination: cost } : {}) };
    this.#store.migrations.put({ ...record, result } as MigrationRecord);
  }

  /** The other side has ended it, too, and it never came to anything here. */
  forget(id: Uuid): void {
    this.#store.migrations.delete(id);
  }

  /** The last few, oldest first. */
  latest(): MigrationRecord[] {
    return this.#store.migrations.latest(50);
  }

  unfinished(): MigrationRecord[] {
    return this.#store.migrations.unfinished();
  }
}
