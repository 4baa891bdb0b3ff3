/**
 * Empties a cloudlet: every running VM goes to the peer that has the most room for it, some at a time. From the
 * first moment on, until it is undrained, the cloudlet takes no VM; that outlives the daemon.
 */
import type { Static } from 'typebox';
import type * as schemas from '../../contract/schemas.ts';
import { type DrainPlan, planDrain } from '../../migration/drain-plan.ts';
import type { Problem } from '../../migration/protocol.ts';
import { AppError, asAppError } from '../../model/errors.ts';
import type { Peer } from '../../model/fleet.ts';
import type { Uuid } from '../../model/ids.ts';
import type { MigrationEngine } from '../../model/migration.ts';
import type { Operation } from '../../model/operation.ts';
import type { VmRecord } from '../../model/vm.ts';
import { residentBytes } from '../../vm/cpu-time.ts';
import type { EventLog } from '../events.ts';
import type { Fleet } from '../fleet.ts';
import type { OperationContext, Operations } from '../operations.ts';
import type { Store } from '../store/index.ts';
import type { VmRegistry } from '../vms/registry.ts';
import { defaultReplicas, lentBytesOf } from './relays.ts';
import type { MigrationService } from './service.ts';

type Request = Static<typeof schemas.Drain>;
type Order = NonNullable<Request['order']>;

const orders: Record<Order, (a: VmRecord, b: VmRecord) => number> = {
  smallest: (a, b) => a.spec.memoryBytes - b.spec.memoryBytes,
  largest: (a, b) => b.spec.memoryBytes - a.spec.memoryBytes,
  oldest: (a, b) => a.createdAt.localeCompare(b.createdAt),
};
const metaKey = 'draining';

export interface DrainOptions {
  store: Store;
  events: EventLog;
  operations: Operations;
  registry: VmRegistry;
  migrations: MigrationService;
  fleet: Fleet;
  /** RTT in ms from each peer to the device that the VM follows; empty if there is none. */
  nearness: (vmId: Uuid) => Promise<Map<Uuid, number>>;
}

const byPreference = (a: { rttMs: number; freeBytes: number }, b: typeof a): number =>
  a.rttMs - b.rttMs || b.freeBytes - a.freeBytes;

export class Drain {
  readonly #options: DrainOptions;
  #operation: Operation | undefined;

  constructor(options: DrainOptions) {
    this.#options = options;
  }

  get isDraining(): boolean {
    return this.#options.store.meta.get(metaKey) === 'yes';
  }

  /** For whatever would bring a VM here. */
  refuseIfDraining(): void {
    if (!this.isDraining) return;
    throw new AppError('wrong_state', 'This cloudlet is drained and takes no VMs', {
      action: 'create',
      state: 'drained',
      allowed: ['undrain'],
    });
  }

  async start(request: Request): Promise<Operation> {
    const { operations, store, events } = this.#options;
    const running = this.#operation && operations.get(this.#operation.id);
    if (running?.state === 'running') {
      throw new AppError('busy', 'The cloudlet is being drained already', { operationId: running.id });
    }
    const targets = this.#targets(request.to);
    const plan = await this.#planFor(request, targets);
    this.#operation = operations.run('cloudlet.drain', {}, (work) =>
      this.#empty(request, targets, plan, work),
    );
    store.transact(() => {
      store.meta.set(metaKey, 'yes');
      events.append({ kind: 'cloudlet.draining', data: {} });
    });
    return this.#operation;
  }

  undrain(): void {
    const { store, events, operations } = this.#options;
    const running = this.#operation && operations.get(this.#operation.id);
    if (running?.state === 'running') operations.cancel(running.id);
    store.transact(() => {
      store.meta.set(metaKey, 'no');
      events.append({ kind: 'cloudlet.undrained', data: {} });
    });
  }

  #targets(wanted: string[] | undefined): Peer[] {
    const peers = this.#options.fleet.peers();
    if (!wanted) return peers;
    return wanted.map((each) => {
      const found = peers.find(({ id, name }) => id === each || name === each);
      if (found) return found;
      throw new AppError('not_found', `There is no peer '${each}'`, { kind: 'peer', name: each });
    });
  }

  #leaving(): VmRecord[] {
    const all = this.#options.registry.all().map(({ record }) => record);
    return all.filter(({ state }) => state === 'running' || state === 'paused');
  }

  /** With a deadline: how each VM leaves. Throws `migration_refused` when the host cannot be empty by then. */
  async #planFor({ deadlineMs }: Request, targets: Peer[]): Promise<DrainPlan | undefined> {
    if (deadlineMs === undefined) return undefined;
    const { fleet, migrations } = this.#options;
    const room = await this.#roomOf(targets);
    const best = room.toSorted((a, b) => b.freeBytes - a.freeBytes)[0];
    if (!best || best.freeBytes < 0)
      throw new AppError('migration_refused', 'Cannot drain: no peer can be reached', { problems: [] });
    const { uplinkBps, toBps } = migrations.ratesTo(best.peer.id);
    const lent = await Promise.all(
      fleet
        .peers()
        .filter(({ id }) => id !== best.peer.id)
        .map((peer) => lentBytesOf(fleet, peer).catch(() => 0)),
    );
    const lenders = lent.filter((bytes) => bytes > 0);
    const plan = planDrain({
      deadlineMs,
      vms: await Promise.all(
        this.#leaving().map(async ({ id, name, process, spec }) => ({
          name,
          memoryBytes: (process && residentBytes(process.pid)) ?? spec.memoryBytes,
          diskBytes: (await migrations.check(id, { to: best.peer.id })).vm.diskBytes,
          toBps,
        })),
      ),
      uplinkBps,
      relays: { count: lenders.length, freeBytes: lenders.reduce((sum, bytes) => sum + bytes, 0) },
      replicas: defaultReplicas,
    });
    if (plan.fits) return plan;
    const value = `${deadlineMs} ms`;
    const wanted = `at least ${plan.totalMs} ms`;
    const message = `Cannot drain in ${value}: as far as is known now it takes ${plan.totalMs} ms`;
    const problem: Problem = { field: 'body.deadlineMs', value: deadlineMs, wanted, message };
    throw new AppError('migration_refused', message, { problems: [problem] });
  }

  async #empty(
    request: Request,
    targets: Peer[],
    plan: DrainPlan | undefined,
    work: OperationContext,
  ): Promise<Record<string, string>> {
    const { registry } = this.#options;
    const place = ({ name }: VmRecord) => plan!.moves.findIndex((move) => move.name === name);
    const order: (a: VmRecord, b: VmRecord) => number = plan
      ? (a, b) => place(a) - place(b)
      : orders[request.order ?? 'smallest'];
    const waiting = this.#leaving().toSorted(order);
    const total = waiting.length;
    const moved: string[] = [];
    const left: { name: string; why: string }[] = [];
    const report = () =>
      work.progress({ phase: 'moving', done: moved.length + left.length, total, unit: 'steps' });
    const worker = async (): Promise<void> => {
      for (let vm = waiting.shift(); vm && !work.signal.aborted; vm = waiting.shift()) {
        try {
          const engine = plan?.moves.find(({ name }) => name === vm.name)?.engine;
          await this.#move(vm, targets, engine, work.signal);
          moved.push(vm.name);
        } catch (error) {
          left.push({ name: vm.name, why: asAppError(error).message });
        }
        report();
      }
    };
    report();
    await Promise.all(Array.from({ length: Math.min(request.parallel ?? 2, total) }, worker));
    work.signal.throwIfAborted();
    const resting = registry
      .all()
      .filter(({ record }) => record.state === 'stopped' || record.state === 'crashed');
    for (const { record } of resting) left.push({ name: record.name, why: `it is ${record.state}` });
    if (left.length === 0) return { moved: moved.join(' ') };
    const names = left.map(({ name, why }) => `${name} (${why})`).join(', ');
    throw new AppError(
      'migration_failed',
      `${moved.length} VMs were moved, ${left.length} are left: ${names}`,
      {
        moved,
        left,
      },
    );
  }

  /** To the peer that is nearest to the VM's device, or else has the most free memory, of those that would take it. */
  async #move(
    vm: VmRecord,
    targets: Peer[],
    engine: MigrationEngine | undefined,
    signal: AbortSignal,
  ): Promise<void> {
    const { migrations, operations } = this.#options;
    const near = await this.#options.nearness(vm.id).catch(() => new Map<Uuid, number>());
    const room = await Promise.all(
      targets.map(async (peer) => ({
        peer,
        freeBytes: await this.#freeBytes(peer).catch(() => -1),
        rttMs: Math.round(near.get(peer.id) ?? Number.MAX_SAFE_INTEGER),
      })),
    );
    let refusal: unknown = new AppError('migration_refused', 'no peer can be reached', { problems: [] });
    for (const { peer, freeBytes } of room.toSorted(byPreference)) {
      if (freeBytes < 0) continue;
      signal.throwIfAborted();
      let operation: Operation;
      try {
        operation = await migrations.start(vm.id, { to: peer.id, ...(engine ? { engine } : {}) });
      } catch (error) {
        refusal = error;
        continue;
      }
      const cancel = () => {
        if (operations.get(operation.id)?.state === 'running') operations.cancel(operation.id);
      };
      signal.addEventListener('abort', cancel);
      // Called off while the two sides were still being asked.
      if (signal.aborted) cancel();
      const ended = await operations.wait(operation.id);
      signal.removeEventListener('abort', cancel);
      if (ended.state === 'succeeded') return;
      throw new AppError(ended.error?.code ?? 'migration_failed', ended.error?.message ?? 'it was not moved');
    }
    throw refusal;
  }

  #roomOf(targets: Peer[]): Promise<{ peer: Peer; freeBytes: number }[]> {
    return Promise.all(
      targets.map(async (peer) => ({ peer, freeBytes: await this.#freeBytes(peer).catch(() => -1) })),
    );
  }

  async #freeBytes(peer: Peer): Promise<number> {
    const answer = await this.#options.fleet.client.fetch(peer, '/v1/cloudlet');
    const { memory, draining } = answer as Partial<Static<typeof schemas.Cloudlet>>;
    return draining ? -1 : (memory?.freeBytes ?? -1);
  }
}
