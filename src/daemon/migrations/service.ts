/**
 * The migrations of this cloudlet: who asks for one, who asks about one, and what an earlier daemon has left. The two
 * halves are in files of their own; while one is at work on a VM, nothing else is.
 */
import type { FastifyBaseLogger } from 'fastify';
import type { Static } from 'typebox';
import type * as schemas from '../../contract/schemas.ts';
import type { CloudletIdentity } from '../../fleet/index.ts';
import type { AcceptedSession, SessionRequest } from '../../link/index.ts';
import type { DestinationMigration } from '../../migration/destination.ts';
import { absentDestination } from '../../migration/destination-machine.ts';
import type { Problem, ToDestination, ToSource } from '../../migration/protocol.ts';
import type { SourceMigration } from '../../migration/source.ts';
import { plannedSource } from '../../migration/source-machine.ts';
import { AppError, asAppError } from '../../model/errors.ts';
import { newId, type Uuid } from '../../model/ids.ts';
import type {
  MigrationLimits,
  MigrationOptions,
  MigrationProgress,
  VmToMove,
} from '../../model/migration.ts';
import type { Operation } from '../../model/operation.ts';
import { diskUsage } from '../../vm/disks.ts';
import { imageFile } from '../../vm/images.ts';
import type { Principal } from '../credentials.ts';
import type { EventLog } from '../events.ts';
import type { Fleet } from '../fleet.ts';
import type { ImageService } from '../images.ts';
import type { OperationContext, Operations } from '../operations.ts';
import type { Paths } from '../paths.ts';
import type { Page, PageRequest, Store } from '../store/index.ts';
import type { Managed, VmRegistry } from '../vms/registry.ts';
import { diskIn, type Runner } from '../vms/runner.ts';
import type { VmService } from '../vms/service.ts';
import { checkArrival } from './arrival.ts';
import { makeDestination } from './destination-half.ts';
import { forecast, linkBpsOf, measureDirtyBps } from './forecast.ts';
import type { HalfParts } from './half.ts';
import { imageHello, sendImage, takeImage } from './image-transfer.ts';
import { MigrationJournal } from './journal.ts';
import { linkPurposes, PeerSide } from './peer-side.ts';
import {
  type DestinationRecord,
  endingOf,
  type MigrationRecord,
  type SourceRecord,
  viewOf,
} from './record.ts';
import { makeSource, removeOldDoors } from './source-half.ts';

export interface MigrationServiceOptions {
  identity: () => CloudletIdentity;
  store: Store;
  events: EventLog;
  operations: Operations;
  registry: VmRegistry;
  vms: VmService;
  images: ImageService;
  runner: Runner;
  fleet: Fleet;
  isDraining: () => boolean;
  paths: Paths;
  log: FastifyBaseLogger;
}

type MigrateVm = Static<typeof schemas.MigrateVm>;

const defaultLimits: MigrationLimits = { downtimeMs: 300, autoConverge: false };

export class MigrationService {
  readonly #options: MigrationServiceOptions;
  readonly #journal: MigrationJournal;
  readonly #peers: PeerSide;
  readonly #parts: HalfParts;
  readonly #outgoing = new Map<Uuid, SourceMigration>();
  readonly #incoming = new Map<Uuid, DestinationMigration>();
  #closed = false;

  constructor(options: MigrationServiceOptions) {
    this.#options = options;
    this.#journal = new MigrationJournal(options.store);
    this.#peers = new PeerSide(options);
    this.#parts = { ...options, journal: this.#journal, peers: this.#peers };
  }

  // --- asked by people

  list(request: PageRequest): Page<Static<typeof schemas.Migration>> {
    const page = this.#options.store.migrations.list(request);
    return { ...page, items: page.items.map((record) => viewOf(this.#live(record))) };
  }

  get(id: Uuid): Static<typeof schemas.Migration> {
    return viewOf(this.#live(this.#journal.require(id)));
  }

  /** The checks of both sides and what it would cost, without moving anything. */
  async plan(reference: string, request: MigrateVm): Promise<Static<typeof schemas.MigrationPlan>> {
    const { managed, peer, vm, options, problems, hasImage, rttMs } = await this.#ask(reference, request);
    if (problems.length > 0) return { problems };
    const dirtyBps = vm.running ? await measureDirtyBps(managed.machine!.qmp) : 0;
    const linkBps = linkBpsOf(this.#journal.latest(), peer.id);
    return {
      problems,
      forecast: forecast({ vm, options, dirtyBps, linkBps, rttMs, sendsImage: !hasImage }),
    };
  }

  /** Starts a migration and answers with the operation that ends when it has. */
  async start(reference: string, request: MigrateVm): Promise<Operation> {
    const { registry } = this.#options;
    const { id, managed, peer, vm, options, problems, hasImage } = await this.#ask(reference, request);
    if (problems.length > 0) throw refused(vm, peer, problems);
    registry.require(managed, 'migrate');
    return this.#operate(managed, { id, vm }, async (work) => {
      if (!hasImage) await this.#sendImage(peer.id, vm, id, work);
      const record: SourceRecord = {
        id,
        role: 'source',
        vm,
        options,
        peer: { id: peer.id, name: peer.name },
        createdAt: new Date().toISOString(),
        state: plannedSource(vm.epoch),
      };
      return this.#migrate(managed, record, work, (migration) => migration.start());
    });
  }

  async #ask(reference: string, request: MigrateVm) {
    const { registry, runner } = this.#options;
    const managed = registry.find(reference);
    registry.require(managed, 'migrate');
    const peer = this.#peers.find(request.to);
    const [id, vm, options] = [newId(), await this.#vmToMove(managed), optionsOf(request)];
    const { qemu } = await runner.facts();
    const sentAt = new Date().toISOString();
    const asked = performance.now();
    const answer = await this.#peers.check(peer, id, { vm, options, qemuVersion: qemu.version, sentAt });
    const rttMs = Math.round(performance.now() - asked);
    return { id, managed, peer, vm, options, rttMs, ...answer };
  }

  #operate(
    managed: Managed,
    { id, vm }: Pick<MigrationRecord, 'id' | 'vm'>,
    work: (work: OperationContext) => Promise<Record<string, string>>,
  ): Operation {
    const subject = { vmId: vm.id, name: vm.name, migrationId: id };
    const operation = this.#options.operations.run('vm.migrate', subject, async (run) => {
      try {
        return await work(run);
      } finally {
        if (managed.operationId === operation.id) delete managed.operationId;
      }
    });
    managed.operationId = operation.id;
    return operation;
  }

  /** Sees a migration to its end, or to that of the daemon; `begin` starts it, or takes it up again. */
  async #migrate(
    managed: Managed,
    record: SourceRecord,
    { signal, progress }: OperationContext,
    begin: (migration: SourceMigration) => Promise<void>,
  ): Promise<Record<string, string>> {
    const { id, vm, peer } = record;
    const ended = Promise.withResolvers<void>();
    const migration = this.#beSource(managed, record, ended.resolve, ({ phase, doneBytes, totalBytes }) =>
      progress({ phase, done: doneBytes, total: totalBytes, unit: 'bytes' }),
    );
    this.#options.registry.update(managed, { state: 'migrating' });
    const onAbort = () => {
      // A daemon that stops lets the migration go on when it is back; only a cancel ends it.
      if ((signal.reason as AppError).code !== 'cancelled') ended.reject(signal.reason);
      else migration.cancel().catch(() => {});
    };
    signal.addEventListener('abort', onAbort);
    migration.waitUntilOver().catch(ended.reject);
    await begin(migration);
    if (signal.aborted) onAbort();
    await ended.promise;
    const { state } = migration;
    if (state.name === 'moved') return { migrationId: id, cloudletId: peer.id, cloudlet: peer.name };
    const ending = endingOf({ ...record, state });
    if (ending?.code === 'refused') throw refused(vm, peer, ending.problems ?? []);
    throw new AppError('migration_failed', `VM '${vm.name}' was not moved: ${ending?.message}`, {
      migrationId: id,
      reason: ending?.code,
    });
  }

  async #sendImage(peerId: Uuid, vm: VmToMove, id: Uuid, { signal, progress }: OperationContext) {
    const { digest, format, fileBytes } = vm.image;
    const session = await this.#peers.open(peerId, 'image', imageHello(id, vm.image), signal);
    await sendImage(session, imageFile(this.#options.paths.images, digest, format), {
      signal,
      onBytes: (done) => progress({ phase: 'image', done, total: fileBytes, unit: 'bytes' }),
    });
  }

  async setLimits(id: Uuid, limits: MigrationLimits): Promise<Static<typeof schemas.Migration>> {
    const record = this.#journal.require(id);
    const migration = this.#outgoing.get(id);
    if (!migration) {
      throw new AppError('wrong_state', 'Limits are changed at the source, while the migration runs', {
        state: record.state.name,
        role: record.role,
        allowed: [],
      });
    }
    await migration.setLimits(limits);
    this.#journal.update(id, (known) => ({
      ...(known ?? record),
      options: { ...record.options, limits },
    }));
    return this.get(id);
  }

  /** An operator's word that the other side will not run the VM; told by an event, for the audit. */
  async claim(reference: string, reason: string, caller: Principal): Promise<void> {
    const { registry, events } = this.#options;
    const { record: vm } = registry.find(reference);
    const record = this.#journal.unfinished().find((each) => each.vm.id === vm.id);
    const migration = record && (this.#outgoing.get(record.id) ?? this.#incoming.get(record.id));
    if (!migration) {
      throw new AppError('wrong_state', `VM '${vm.name}' is in no migration: this cloudlet owns it already`, {
        action: 'claim',
        state: vm.state,
        allowed: [],
      });
    }
    await migration.claim(reason);
    events.append({ kind: 'vm.claimed', vmId: vm.id, data: { name: vm.name, reason, by: caller.name } });
  }

  // --- asked by the other cloudlet

  /** What does not fit for a VM to come here; all of it at once. */
  async check(body: Static<typeof schemas.CheckMigration>): Promise<Static<typeof schemas.MigrationCheck>> {
    const image = this.#options.store.images.get(body.vm.image.digest);
    return { problems: await this.#problems(body.vm, body.sentAt), hasImage: image !== undefined };
  }

  async #problems(vm: VmToMove, sentAt?: string): Promise<Problem[]> {
    const { registry, runner, paths, isDraining, store } = this.#options;
    return checkArrival(vm, {
      isDraining: isDraining(),
      ...(await runner.capacity(paths.root)),
      hasImage: store.images.get(vm.image.digest) !== undefined,
      isTaken: (what) => registry.has(what),
      sentAt,
    });
  }

  /** A message about a migration; it is dealt with in its own time. */
  tell(id: Uuid, message: ToDestination | ToSource, caller: Principal): void {
    if (caller.kind !== 'cloudlet' || this.#closed) return;
    this.#receive(id, message, { id: caller.cloudletId, name: caller.name }).catch((error) =>
      this.#options.log.warn({ err: error, migrationId: id }, 'message not taken'),
    );
  }

  async #receive(id: Uuid, message: ToDestination | ToSource, from: MigrationRecord['peer']): Promise<void> {
    const record = this.#journal.get(id);
    if (record && record.peer.id !== from.id)
      throw new AppError('forbidden', `Cloudlet ${from.name} has no part in migration ${id}`);
    if (record?.role === 'source') {
      // One that has ended still answers a destination that asks what became of it.
      const migration = this.#outgoing.get(id) ?? this.#beSource(undefined, record);
      return migration.receive(message as ToSource);
    }
    const toDestination = message as ToDestination;
    const known = this.#incoming.get(id);
    if (known) return known.receive(toDestination);
    if (toDestination.name === 'prepare') {
      const { vm, options } = toDestination;
      const createdAt = new Date().toISOString();
      const state = absentDestination;
      const common = { id, vm, options, peer: from, createdAt };
      return this.#beDestination({ ...common, role: 'destination', state }).receive(toDestination);
    }
    if (toDestination.name === 'commit') return this.#peers.send(from.id, id, { name: 'unknown' });
    if (toDestination.name === 'abort') return this.#peers.send(from.id, id, { name: 'gone' });
  }

  /** Takes a session of the link: bytes of a migration by its ticket, or a base image. */
  acceptSession({ purpose, hello, cloudletId }: SessionRequest): AcceptedSession {
    const { images, log } = this.#options;
    if (purpose === linkPurposes.image) {
      const onFailure = (error: unknown) => log.warn({ err: error, cloudletId }, 'an image was not taken');
      return { onSession: (session) => void takeImage(session, images).catch(onFailure) };
    }
    const id = String(hello.migrationId);
    const migration = this.#incoming.get(id);
    const kind = (['disk', 'memory'] as const).find((each) => linkPurposes[each] === purpose);
    if (!kind || !migration || this.#journal.get(id)?.peer.id !== cloudletId) {
      throw new AppError('forbidden', `There is no migration that waits for this ${purpose} session`, {
        wanted: 'ticket',
      });
    }
    return {
      onSession: (session) => {
        session.on('error', () => {});
        try {
          migration.accept(kind, String(hello.secret), session);
        } catch (error) {
          session.destroy(asAppError(error));
        }
      },
    };
  }

  // --- life of the daemon

  /** Goes on with what an earlier daemon had begun; the VMs whose QEMU runs have been taken hold of before. */
  async recover(): Promise<void> {
    const { registry, vms, paths, log } = this.#options;
    const unfinished = this.#journal.unfinished();
    for (const record of unfinished) {
      await removeOldDoors(paths.vm(record.vm.id));
      this.#takeUp(record);
    }
    // A daemon may die between a VM's record and that of its migration.
    for (const managed of registry.all()) {
      const { id, state, epoch = 1 } = managed.record;
      if (state !== 'migrating' || unfinished.some(({ vm }) => vm.id === id)) continue;
      log.warn({ vmId: id, state }, 'a VM is in no migration any more');
      await vms.settle(managed, { epoch });
    }
  }

  #takeUp(record: MigrationRecord): void {
    const { registry, log } = this.#options;
    const { id, vm } = record;
    const fields = { migrationId: id, vmId: vm.id };
    log.warn({ ...fields, role: record.role, state: record.state.name }, 'a migration goes on');
    const managed = registry.all().find((each) => each.record.id === vm.id);
    const onFailure = (error: unknown) => log.error({ ...fields, err: error }, 'migration stands still');
    if (record.role === 'destination') this.#beDestination(record, managed).restart().catch(onFailure);
    else if (!managed) this.#beSource(undefined, record).restart().catch(onFailure);
    else
      this.#operate(managed, record, (work) =>
        this.#migrate(managed, record, work, (migration) => migration.restart()),
      );
  }

  async close(): Promise<void> {
    this.#closed = true;
    await Promise.all([...this.#outgoing.values(), ...this.#incoming.values()].map((each) => each.stop()));
  }

  #beSource(
    managed: Managed | undefined,
    record: SourceRecord,
    onEnd: () => void = () => {},
    onProgress: (progress: MigrationProgress) => void = () => {},
  ): SourceMigration {
    const onOver = () => {
      this.#outgoing.delete(record.id);
      onEnd();
    };
    const migration = makeSource(this.#parts, record, managed, { onProgress, onOver });
    this.#outgoing.set(record.id, migration);
    return migration;
  }

  #beDestination(record: DestinationRecord, found?: Managed): DestinationMigration {
    const { id, vm } = record;
    if (found) found.operationId = id;
    const migration = makeDestination(this.#parts, record, found, {
      check: () => this.#problems(vm),
      onOver: () => this.#incoming.delete(id),
    });
    this.#incoming.set(id, migration);
    return migration;
  }

  /** The record with what is known only while it runs. */
  #live(record: MigrationRecord): MigrationRecord {
    const migration = this.#outgoing.get(record.id);
    return migration && !record.finishedAt ? { ...record, progress: migration.progress } : record;
  }

  async #vmToMove({ record }: Managed): Promise<VmToMove> {
    const { images, paths } = this.#options;
    const { digest, format, fileBytes, virtualBytes } = images.get(record.spec.disk.image);
    const { allocatedBytes } = await diskUsage(diskIn(paths.vm(record.id)));
    return {
      id: record.id,
      name: record.name,
      spec: record.spec,
      running: record.state === 'running',
      epoch: record.epoch ?? 1,
      runningWith: record.runningWith ?? 'tcg',
      image: { digest, format, fileBytes, virtualBytes },
      diskBytes: allocatedBytes,
    };
  }
}

function optionsOf(request: MigrateVm): MigrationOptions {
  return {
    mode: request.mode ?? 'auto',
    storage: 'copied',
    limits: { ...defaultLimits, ...request.limits },
    channels: 0,
  };
}

function refused(vm: VmToMove, peer: { name: string }, problems: Problem[]): AppError {
  const list = problems.map(({ message }) => message).join('; ');
  return new AppError('migration_refused', `${peer.name} cannot take VM '${vm.name}': ${list}`, { problems });
}
