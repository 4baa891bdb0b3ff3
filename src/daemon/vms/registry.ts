/**
 * The VMs of this cloudlet: records in the store, each with the QEMU that runs it now. Every change of state
 * goes through `update`, is written before anybody sees it, and is told by one event. Reads never touch SQLite.
 */
import type { Static } from 'typebox';
import type { Vm } from '../../contract/schemas.ts';
import { AppError } from '../../model/errors.ts';
import type { Uuid } from '../../model/ids.ts';
import {
  allowedActions,
  isAllowed,
  statesThatAllow,
  type VmAction,
  type VmState,
} from '../../model/states.ts';
import type { VmRecord } from '../../model/vm.ts';
import type { Machine } from '../../vm/machine.ts';
import type { EventLog } from '../events.ts';
import type { PageRequest, Store } from '../store/index.ts';

export interface Managed {
  record: VmRecord;
  machine?: Machine;
  /** The operation at work on it: one at a time. */
  operationId?: Uuid;
  /** That operation is its migration to here, and it runs here: it lacks something, which comes beside it. */
  hasArrived?: boolean;
  /** QEMU has stopped it because its disk fails; see `stalls.ts`. */
  stalled?: { at: string; reason: string };
  /** While the QEMU of an earlier daemon does not answer: resolves when it does, or has ended. */
  silent?: Promise<void>;
}

export class VmRegistry {
  readonly #store: Store;
  readonly #events: EventLog;
  readonly #byId = new Map<Uuid, Managed>();
  readonly #byName = new Map<string, Managed>();
  /** JSON of list pages, until any VM changes: lists are asked for far more often than VMs change. */
  readonly #pages = new Map<string, string>();

  constructor(store: Store, events: EventLog) {
    this.#store = store;
    this.#events = events;
    for (const record of store.vms.all()) this.#keep({ record });
  }

  #keep(managed: Managed): void {
    this.#byId.set(managed.record.id, managed);
    this.#byName.set(managed.record.name, managed);
    this.#pages.clear();
  }

  all(): Managed[] {
    return [...this.#byId.values()];
  }

  /** Whether it is still one of them. */
  holds(managed: Managed): boolean {
    return this.#byId.get(managed.record.id) === managed;
  }

  /** By id or by name. */
  find(reference: string): Managed {
    const found = this.#byId.get(reference) ?? this.#byName.get(reference);
    if (found) return found;
    throw new AppError('not_found', `There is no VM '${reference}'`, { kind: 'vm', name: reference });
  }

  requireFreeName(name: string): void {
    if (this.#byName.has(name)) {
      throw new AppError('name_taken', `There is a VM '${name}' already`, { kind: 'vm', name });
    }
  }

  add(record: VmRecord): Managed {
    const managed = { record };
    this.#store.transact(() => {
      this.#store.vms.insert(record);
      this.#tell(record, record.state);
    });
    this.#keep(managed);
    return managed;
  }

  /** Writes the changes, then shows them. An undefined value takes the field away. What changes nothing is not written. */
  update(managed: Managed, changes: { [K in keyof VmRecord]?: VmRecord[K] | undefined }): void {
    if (Object.entries(changes).every(([key, value]) => managed.record[key as keyof VmRecord] === value))
      return;
    const before = managed.record.state;
    const record = { ...managed.record, ...changes } as VmRecord;
    for (const [key, value] of Object.entries(changes)) {
      if (value === undefined) delete record[key as keyof VmRecord];
    }
    this.#store.transact(() => {
      this.#store.vms.update(record);
      if (record.state !== before) this.#tell(record, record.state);
    });
    managed.record = record;
    this.#pages.clear();
  }

  remove(managed: Managed): void {
    this.#store.transact(() => {
      this.#store.vms.delete(managed.record.id);
      this.#tell(managed.record, 'deleted');
    });
    this.#byId.delete(managed.record.id);
    this.#byName.delete(managed.record.name);
    this.#pages.clear();
  }

  /**
   * Refuses with what can be done now, unless the action fits the state and nobody is at work on the VM. An action
   * that needs QEMU then has it. Errors: `busy`, `wrong_state`, `qemu_failed` while QEMU does not answer.
   */
  require(managed: Managed, action: VmAction): void {
    const { record, machine, operationId, stalled, hasArrived } = managed;
    const { name, state, process } = record;
    const allowed = this.#allowed(managed);
    if (allowed.includes(action)) return;
    if (operationId && !(machine && isLook(action))) {
      const why =
        action === 'resume' && stalled && hasArrived
          ? `its migration to here is not over. It stands still for its disk (${stalled.reason}), and goes on by itself when ` +
            'that works again'
          : 'an operation is at work on it';
      throw new AppError('busy', `Cannot ${action} VM '${name}': ${why}`, { operationId, state, allowed });
    }
    if (!isAllowed(action, state)) {
      const wanted = statesThatAllow(action);
      throw new AppError(
        'wrong_state',
        `Cannot ${action} VM '${name}' while it is ${state}: wanted ${wanted.join(' or ')}`,
        { action, state, wanted, allowed },
      );
    }
    throw new AppError('qemu_failed', `Cannot ${action} VM '${name}': its QEMU does not answer`, {
      pid: process?.pid,
      state,
      allowed,
    });
  }

  #allowed({ record, machine, operationId }: Managed): VmAction[] {
    const allowed = allowedActions(record.state);
    if (operationId) return machine ? allowed.filter(isLook) : [];
    // A QEMU that an earlier daemon left and that does not answer can only be done away with.
    return record.process && !machine ? allowed.filter((action) => action === 'delete') : allowed;
  }

  #tell({ id, name, lastExit }: VmRecord, what: VmState | 'deleted'): void {
    const ended = what === 'stopped' || what === 'crashed';
    const exit = ended && lastExit ? { exit: lastExit } : {};
    this.#events.append({ kind: `vm.${what}`, vmId: id, data: { name, ...exit } });
  }

  view(managed: Managed): Static<typeof Vm> {
    const { process, ...record } = managed.record;
    return {
      ...record,
      ...(process ? { pid: process.pid } : {}),
      ...(managed.stalled ? { stalled: managed.stalled } : {}),
      ...(managed.operationId ? { operationId: managed.operationId } : {}),
      allowedActions: this.#allowed(managed),
    };
  }

  /** One page of summaries, oldest first, as JSON. */
  page(query: PageRequest): string {
    const key = `${query.limit} ${query.after}`;
    const known = this.#pages.get(key);
    if (known) return known;
    const body = JSON.stringify(this.#store.vms.list(query));
    // Few shapes of the question are asked again and again; strange ones must not fill the memory.
    if (this.#pages.size < 100) this.#pages.set(key, body);
    return body;
  }

  /** Names of the VMs that are being made from this golden snapshot now. */
  startingFrom(snapshotId: Uuid): string[] {
    return this.all()
      .map(({ record }) => record)
      .filter(({ origin }) => origin?.kind === 'snapshot' && origin.snapshotId === snapshotId)
      .filter(({ state }) => state === 'creating' || state === 'starting')
      .map(({ name }) => name);
  }

  countByState(): Map<VmState, number> {
    const counts = new Map<VmState, number>();
    for (const { record } of this.#byId.values())
      counts.set(record.state, (counts.get(record.state) ?? 0) + 1);
    return counts;
  }
}

/** Looking at a console or a guest disturbs no operation. */
const isLook = (action: VmAction): boolean => action === 'console' || action === 'guest';
