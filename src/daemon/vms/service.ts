/**
 * What can be done with VMs: each method checks, journals the new state, starts an operation and answers with it.
 * The operation works outside of any lock; `operationId` on the VM keeps others away from it meanwhile.
 */
import { rm } from 'node:fs/promises';
import path from 'node:path';
import type { Static } from 'typebox';
import type { CloneVm, CreateVm, Exec, ExecReply, Guest, StopVm, Vm } from '../../contract/schemas.ts';
import { AppError } from '../../model/errors.ts';
import { newId } from '../../model/ids.ts';
import type { Operation, OperationKind } from '../../model/operation.ts';
import type { VmAction, VmState } from '../../model/states.ts';
import type { Continuity, VmRecord, VmSpec } from '../../model/vm.ts';
import type { Console } from '../../vm/console.ts';
import type { Machine } from '../../vm/machine.ts';
import { machinePaths } from '../../vm/paths.ts';
import { readTail } from '../../vm/tail.ts';
import type { Config } from '../config.ts';
import { invalidRequest } from '../http/validation.ts';
import type { ImageService } from '../images.ts';
import type { Metrics } from '../metrics.ts';
import type { Networks } from '../networks/service.ts';
import type { OperationContext, Operations } from '../operations.ts';
import type { Paths } from '../paths.ts';
import type { KeptMemory } from '../references/kept-memory.ts';
import type { SnapshotService } from '../snapshots.ts';
import type { PageRequest } from '../store/index.ts';
import { specFor, withNewIdentity } from './hardware.ts';
import type { Managed, VmRegistry } from './registry.ts';
import { type Captured, capturedIn, type Runner } from './runner.ts';
import type { VmWatch } from './watch.ts';

export interface VmServiceOptions {
  registry: VmRegistry;
  watch: VmWatch;
  runner: Runner;
  operations: Operations;
  images: ImageService;
  snapshots: SnapshotService;
  /** Goes with the VM that it belongs to. */
  kept: KeptMemory;
  networks: Networks;
  /** A cloudlet that is being emptied takes no new VMs. */
  refuseIfDraining: () => void;
  config: Config;
  paths: Paths;
  metrics: Metrics;
}

/** How a VM that is started gets its memory. */
type Start = 'boot' | { from: 'snapshot' | 'clone'; captured: Captured; identity: { from: VmSpec } | 'keep' };

export class VmService {
  readonly #registry: VmRegistry;
  readonly #watch: VmWatch;
  readonly #runner: Runner;
  readonly #operations: Operations;
  readonly #images: ImageService;
  readonly #snapshots: SnapshotService;
  readonly #kept: KeptMemory;
  readonly #networks: Networks;
  readonly #refuseIfDraining: () => void;
  readonly #config: Config;
  readonly #paths: Paths;
  readonly #metrics: Metrics;

  constructor(options: VmServiceOptions) {
    this.#registry = options.registry;
    this.#watch = options.watch;
    this.#runner = options.runner;
    this.#operations = options.operations;
    this.#images = options.images;
    this.#snapshots = options.snapshots;
    this.#kept = options.kept;
    this.#networks = options.networks;
    this.#refuseIfDraining = options.refuseIfDraining;
    this.#config = options.config;
    this.#paths = options.paths;
    this.#metrics = options.metrics;
  }

  // --- looking

  view(reference: string): Static<typeof Vm> {
    return this.#registry.view(this.#registry.find(reference));
  }

  /** A page of summaries as JSON. */
  listPage(query: PageRequest): string {
    return this.#registry.page(query);
  }

  /** What the guest agent says. Errors: `wrong_state`, `agent_unavailable`. */
  async guest(reference: string): Promise<Static<typeof Guest>> {
    return this.#machineFor(reference, 'guest').agent.facts();
  }

  async exec(reference: string, request: Static<typeof Exec>): Promise<Static<typeof ExecReply>> {
    const { agent } = this.#machineFor(reference, 'guest');
    // The contract wants at least one item.
    const argv = request.argv as [string, ...string[]];
    return agent.exec({ ...request, argv, timeoutMs: request.timeoutMs ?? 30_000 });
  }

  async consoleLog(reference: string, tailBytes: number): Promise<string> {
    const { record } = this.#registry.find(reference);
    const { consoleLog } = machinePaths(this.#paths.vm(record.id));
    return (await readTail(consoleLog, tailBytes)).toString('utf8');
  }

  /** The live console. Errors: `wrong_state`. */
  requireConsole(reference: string): Console {
    return this.#machineFor(reference, 'console').console;
  }

  // --- making

  async create(request: Static<typeof CreateVm>): Promise<Operation> {
    if ((request.image === undefined) === (request.snapshot === undefined)) {
      throw invalidRequest([{ field: 'body', wanted: 'either image or snapshot' }]);
    }
    this.#refuseIfDraining();
    this.#registry.requireFreeName(request.name);
    return request.snapshot === undefined
      ? this.#createFromImage(request, request.image!)
      : this.#createFromSnapshot(request, request.snapshot);
  }

  async #createFromImage(request: Static<typeof CreateVm>, imageReference: string): Promise<Operation> {
    const image = this.#images.get(imageReference);
    const spec = specFor(request, image, this.#config);
    await this.#runner.check(spec);
    // It may have been removed meanwhile; from here on the record keeps it.
    this.#images.get(image.digest);
    const managed = this.#addAttached(newRecord(request.name, spec, request));
    return this.#operate(
      managed,
      'vm.create',
      { to: 'creating', undo: () => this.#discard(managed) },
      async (work) => {
        // One on shared storage needs the image only now, so its record does not keep it.
        using _ = this.#images.hold(image.digest, { kind: 'vm', name: request.name });
        work.progress({ phase: 'disk', done: 0, total: 2, unit: 'steps' });
        await this.#runner.makeDisk(managed.record, image, work.signal);
        if (request.start === false) return this.#registry.update(managed, { state: 'stopped' });
        work.progress({ phase: 'start', done: 1, total: 2, unit: 'steps' });
        await this.#begin(managed, 'boot', work.signal);
      },
    );
  }

  async #createFromSnapshot(request: Static<typeof CreateVm>, reference: string): Promise<Operation> {
    const snapshot = this.#snapshots.get(reference);
    for (const field of ['instanceType', 'hardware', 'seed'] as const) {
      if (request[field] === undefined) continue;
      throw invalidRequest([
        { field: `body.${field}`, wanted: 'nothing: a golden snapshot has its own hardware' },
      ]);
    }
    if (request.start === false) {
      throw invalidRequest([
        { field: 'body.start', value: false, wanted: 'true: its memory is what a snapshot is for' },
      ]);
    }
    const spec = onStorage(withNewIdentity(snapshot.spec, request.name), request.storage);
    await this.#runner.check(spec);
    // It may have been removed meanwhile; from here on the record keeps it.
    this.#snapshots.get(snapshot.id);
    const managed = this.#addAttached({
      ...newRecord(request.name, spec, request),
      origin: { kind: 'snapshot', snapshotId: snapshot.id },
    });
    const captured = capturedIn(this.#paths.snapshot(snapshot.id));
    return this.#operate(
      managed,
      'vm.create',
      { to: 'creating', undo: () => this.#discard(managed) },
      async (work) => {
        work.progress({ phase: 'disk', done: 0, total: 2, unit: 'steps' });
        await this.#runner.copyDisk(managed.record, captured.disk, work.signal);
        work.progress({ phase: 'start', done: 1, total: 2, unit: 'steps' });
        await this.#begin(
          managed,
          { from: 'snapshot', captured, identity: { from: snapshot.spec } },
          work.signal,
        );
      },
    );
  }

  async clone(reference: string, request: Static<typeof CloneVm>): Promise<Operation> {
    const original = this.#registry.find(reference);
    this.#registry.require(original, 'clone');
    this.#registry.requireFreeName(request.name);
    const { machine, record } = original;
    const identity = request.identity ?? 'new';
    if (record.state === 'running' && identity === 'new') {
      await machine!.agent.ping();
      this.#registry.require(original, 'clone');
    }
    const spec = identity === 'keep' ? record.spec : withNewIdentity(record.spec, request.name);
    const made: VmRecord = {
      ...newRecord(request.name, spec, record),
      origin: { kind: 'clone', vmId: record.id },
    };
    const clone = identity === 'keep' ? this.#registry.add(made) : this.#addAttached(made);
    const undo = () => this.#discard(clone);
    return this.#operate(clone, 'vm.clone', { to: 'creating', undo, also: original }, async (work) => {
      if (!machine) {
        work.progress({ phase: 'disk', done: 0, total: 1, unit: 'steps' });
        await this.#runner.copyDisk(clone.record, this.#runner.diskOf(record), work.signal);
        return this.#registry.update(clone, { state: 'stopped' });
      }
      const directory = path.join(this.#paths.captures, clone.record.id);
      await using cleanUp = new AsyncDisposableStack();
      cleanUp.defer(() => rm(directory, { recursive: true, force: true }));
      work.progress({ phase: 'capture', done: 0, total: 2, unit: 'steps' });
      const { disk } = record.spec;
      const image = disk.storage === undefined ? this.#images.get(disk.image) : undefined;
      const captured = await this.#runner.capture(machine, record.spec, image, directory, work.signal);
      work.progress({ phase: 'start', done: 1, total: 2, unit: 'steps' });
      await this.#runner.copyDisk(clone.record, captured.disk, work.signal);
      const from = identity === 'keep' ? 'keep' : { from: record.spec };
      await this.#begin(clone, { from: 'clone', captured, identity: from }, work.signal);
      // The clone of a VM that rests does so, too, as soon as it is somebody else.
      if (record.state === 'paused') await this.#rest(clone);
    });
  }

  // --- running

  async start(reference: string): Promise<Operation> {
    const managed = this.#registry.find(reference);
    await this.#runner.check(managed.record.spec);
    this.#registry.require(managed, 'start');
    const before = managed.record.state;
    const undo = async () => this.#registry.update(managed, { state: before, process: undefined });
    return this.#operate(managed, 'vm.start', { to: 'starting', undo }, (work) =>
      this.#begin(managed, 'boot', work.signal),
    );
  }

  async stop(reference: string, request: Static<typeof StopVm>): Promise<Operation> {
    const managed = this.#registry.find(reference);
    this.#registry.require(managed, 'stop');
    const graceMs = request.force ? 0 : (request.graceMs ?? 30_000);
    const { state } = managed.record;
    const undo = async () => {
      this.#registry.update(managed, { state });
      await this.#watch.observe(managed);
    };
    return this.#operate(managed, 'vm.stop', { to: 'stopping', undo }, async ({ signal }) => {
      await this.#watch.ended(managed, await managed.machine!.stop({ graceMs, signal }));
    });
  }

  pause(reference: string): Operation {
    const managed = this.#registry.find(reference);
    this.#registry.require(managed, 'pause');
    return this.#operate(managed, 'vm.pause', {}, () => this.#rest(managed));
  }

  async #rest(managed: Managed): Promise<void> {
    await managed.machine!.pause();
    this.#registry.update(managed, { state: 'paused' });
  }

  resume(reference: string): Operation {
    const managed = this.#registry.find(reference);
    this.#registry.require(managed, 'resume');
    return this.#operate(managed, 'vm.resume', {}, async () => {
      await managed.machine!.resume();
      this.#registry.update(managed, { state: 'running' });
    });
  }

  delete(reference: string, { force = false }: { force?: boolean }): Operation {
    const managed = this.#registry.find(reference);
    this.#registry.require(managed, 'delete');
    const { state, name } = managed.record;
    if (managed.record.process && !force) {
      throw new AppError(
        'wrong_state',
        `Cannot delete VM '${name}' while it is ${state}: stop it first, or use force`,
        {
          action: 'delete',
          state,
          wanted: ['stopped', 'crashed'],
          allowed: this.#registry.view(managed).allowedActions,
        },
      );
    }
    const undo = async () => {
      // Its disk could not be removed: that can be tried again.
      if (this.#registry.holds(managed) && !managed.machine)
        this.#registry.update(managed, { state: 'stopped', process: undefined });
    };
    return this.#operate(managed, 'vm.delete', { to: 'deleting', undo }, () => this.#discard(managed));
  }

  // --- inner works

  /** The QEMU of a VM whose state allows the action. */
  #machineFor(reference: string, action: VmAction): Machine {
    const managed = this.#registry.find(reference);
    this.#registry.require(managed, action);
    return managed.machine!;
  }

  /**
   * Journals the state `to`, then runs the work as an operation that owns the VM (and `also`) until it ends. When
   * the work fails or is cancelled, `undo` brings the VM back to a state in which it can rest.
   */
  #operate(
    managed: Managed,
    kind: OperationKind,
    { to, undo, also }: { to?: VmState; undo?: () => Promise<void>; also?: Managed },
    work: (work: OperationContext) => Promise<void>,
  ): Operation {
    const { id, name, state } = managed.record;
    if (to && to !== state) this.#registry.update(managed, { state: to });
    const owned = also ? [managed, also] : [managed];
    try {
      const operation = this.#operations.run(kind, { vmId: id, name }, async (run) => {
        try {
          await work(run);
          return { vmId: id };
        } catch (error) {
          await undo?.();
          throw error;
        } finally {
          for (const each of owned) delete each.operationId;
        }
      });
      for (const each of owned) each.operationId = operation.id;
      return operation;
    } catch (error) {
      // The operation did not begin (too many at once).
      if (to === 'creating') {
        this.#networks.leases.releaseAll(id);
        this.#registry.remove(managed);
      } else if (to) this.#registry.update(managed, { state });
      throw error;
    }
  }

  /** With its address in this cloudlet's network, or not at all. */
  #addAttached(record: VmRecord): Managed {
    const attached = this.#networks.attach(record.id, record.spec);
    try {
      return this.#registry.add({ ...record, ...attached });
    } catch (error) {
      this.#networks.leases.releaseAll(record.id);
      throw error;
    }
  }

  /**
   * Starts QEMU and journals it; afterwards the VM runs. One that is being made stays `creating` until then, so that
   * a daemon that dies leaves nothing of it.
   */
  async #begin(managed: Managed, start: Start, signal: AbortSignal): Promise<void> {
    const began = performance.now();
    const { machine, accelerator } =
      start === 'boot'
        ? await this.#runner.boot(managed.record, signal)
        : await this.#runner.resumeCaptured(managed.record, start.captured, start.identity, signal);
    this.attach(managed, machine);
    this.#registry.update(managed, {
      state: 'running',
      process: machine.process,
      runningWith: accelerator,
      lastExit: undefined,
    });
    this.#metrics.observeStart(start === 'boot' ? 'boot' : start.from, (performance.now() - began) / 1000);
  }

  /** From now on the VM's state follows what its QEMU does. */
  attach(managed: Managed, machine: Machine): void {
    this.#watch.attach(managed, machine);
  }

  /** A migration has ended and the VM is this cloudlet's: its state is what QEMU says. */
  async settle(managed: Managed, { epoch }: { epoch: number }): Promise<void> {
    this.#registry.update(managed, { epoch });
    await this.#watch.settle(managed);
  }

  /** Removes a VM that another cloudlet owns now, or never came; its QEMU has ended. A disk on shared storage stays. */
  async forget(managed: Managed): Promise<void> {
    delete managed.machine;
    await this.#runner.discard(managed.record.id);
    this.#registry.remove(managed);
  }

  /** Nothing is left of the VM: process, taps, files, record. */
  async #discard(managed: Managed): Promise<void> {
    const { machine, record } = managed;
    if (machine) await machine.kill();
    else if (record.process) await this.#runner.end(record.id);
    delete managed.machine;
    await this.#runner.removeSharedDisk(record).catch((error) => {
      // Of one that is half made there may be nothing.
      if (record.state !== 'creating') throw error;
    });
    await this.#runner.discard(record.id);
    await this.#networks.source.forget(record.id);
    this.#registry.remove(managed);
    await this.#kept.forget(record.id);
  }
}

const onStorage = (spec: VmSpec, storage: string | undefined): VmSpec =>
  storage === undefined ? spec : { ...spec, disk: { ...spec.disk, storage } };

function newRecord(
  name: string,
  spec: VmSpec,
  { continuity, tenant }: { continuity?: Continuity; tenant?: string },
): VmRecord {
  const createdAt = new Date().toISOString();
  return {
    id: newId(),
    name,
    state: 'creating',
    spec,
    createdAt,
    ...(continuity ? { continuity } : {}),
    ...(tenant ? { tenant } : {}),
  };
}
