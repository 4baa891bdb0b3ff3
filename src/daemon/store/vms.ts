/** The VMs that this cloudlet owns. The name is unique; the image that a disk stands on must be in the store. */
import { AppError } from '../../model/errors.ts';
import type { ImageDigest, Uuid } from '../../model/ids.ts';
import type { VmState } from '../../model/states.ts';
import type { VmRecord } from '../../model/vm.ts';
import { type Database, type Statement, violatesUnique } from './database.ts';
import { type Page, type PageRequest, readPage } from './page.ts';

/** What a list says of a VM, read without touching the record. */
export interface VmSummary {
  id: Uuid;
  name: string;
  state: VmState;
  createdAt: string;
  image: ImageDigest;
  cpus: number;
  memoryBytes: number;
}

interface Row {
  record: string;
}
interface SummaryRow {
  id: string;
  name: string;
  state: VmState;
  created_at: string;
  image: string;
  cpus: number;
  memory_bytes: number;
}

export class VmRepository {
  readonly #byId: Statement<Row>;
  readonly #all: Statement<Row>;
  readonly #page: Statement<SummaryRow>;
  readonly #insert: Statement<never>;
  readonly #update: Statement<never>;
  readonly #delete: Statement<never>;

  constructor(database: Database) {
    this.#byId = database.prepare('SELECT record FROM vms WHERE id = ?');
    this.#all = database.prepare('SELECT record FROM vms ORDER BY created_at, id');
    this.#page = database.prepare(
      `SELECT id, name, state, created_at, image, cpus, memory_bytes FROM vms
       WHERE (created_at, id) > (?, ?) ORDER BY created_at, id LIMIT ?`,
    );
    this.#insert = database.prepare(
      `INSERT INTO vms (name, state, image, base, cpus, memory_bytes, record, created_at, id)
       VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)`,
    );
    this.#update = database.prepare(
      'UPDATE vms SET name = ?, state = ?, image = ?, base = ?, cpus = ?, memory_bytes = ?, record = ? WHERE id = ?',
    );
    this.#delete = database.prepare('DELETE FROM vms WHERE id = ?');
  }

  get(id: Uuid): VmRecord | undefined {
    return parse(this.#byId.get(id));
  }

  /** Every VM, oldest first: for the start of the daemon, which must look at each of them. */
  all(): VmRecord[] {
    return this.#all.all().map((row) => parse(row)!);
  }

  /** Oldest first. */
  list(request: PageRequest): Page<VmSummary> {
    return readPage(this.#page, request, (row) => [row.created_at, row.id], summarise);
  }

  /** Errors: `name_taken`. */
  insert(vm: VmRecord): void {
    refuseTakenName(vm, () => this.#insert.run(...columns(vm), vm.createdAt, vm.id));
  }

  /** Writes the whole record. Errors: `name_taken`, `not_found`. */
  update(vm: VmRecord): void {
    const { changes } = refuseTakenName(vm, () => this.#update.run(...columns(vm), vm.id));
    if (changes === 0) {
      throw new AppError('not_found', `Cannot update VM ${vm.id}: it is gone.`, { kind: 'vm', name: vm.id });
    }
  }

  /** False if there was none. */
  delete(id: Uuid): boolean {
    return this.#delete.run(id).changes === 1;
  }
}

const columns = (vm: VmRecord): [string, string, string, string | null, number, number, string] => [
  vm.name,
  vm.state,
  vm.spec.disk.image,
  vm.spec.disk.storage === undefined ? vm.spec.disk.image : null,
  vm.spec.cpu.count,
  vm.spec.memoryBytes,
  JSON.stringify(vm),
];

const parse = (row: Row | undefined): VmRecord | undefined =>
  row === undefined ? undefined : (JSON.parse(row.record) as VmRecord);

const summarise = (row: SummaryRow): VmSummary => ({
  id: row.id,
  name: row.name,
  state: row.state,
  createdAt: row.created_at,
  image: row.image,
  cpus: row.cpus,
  memoryBytes: row.memory_bytes,
});

function refuseTakenName<T>(vm: VmRecord, write: () => T): T {
  try {
    return write();
  } catch (error) {
    if (!violatesUnique(error, 'vms.name')) throw error;
    throw new AppError('name_taken', `Cannot name a VM ${vm.name}: another VM has that name.`, {
      kind: 'vm',
      name: vm.name,
    });
  }
}
