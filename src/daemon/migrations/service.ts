/**
 * The migrations of this cloudlet: who asks for one, who asks about one, and what an earlier daemon has left. The two
 * halves are in files of their own; while one is at work on a VM, nothing else is.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import type { FastifyBaseLogger } from 'fastify';
import type { Static } from 'typebox';
import type * as schemas from '../../contract/schemas.ts';
import type { CloudletIdentity } from '../../fleet/index.ts';
import type { Session } from '../../link/index.ts';
import { chooseEngine, type EngineChoice } from '../../migration/engine-policy.ts';
import { missingCpuFeaturesOf } from '../../migration/preflight.ts';
import type { Problem } from '../../migration/protocol.ts';
import type { SourceMigration } from '../../migration/source.ts';
import { plannedSource } from '../../migration/source-machine.ts';
import { AppError, asAppError } from '../../model/errors.ts';
import type { Peer } from '../../model/fleet.ts';
import { newId, type Uuid } from '../../model/ids.ts';
import type { MigrationEngine, MigrationLimits, MigrationOptions, VmToMove } from '../../model/migration.ts';
import type { Operation } from '../../model/operation.ts';
import { imageFile } from '../../vm/images.ts';
import { machinePaths } from '../../vm/paths.ts';
import { SpareMonitor } from '../../vm/spare-monitor.ts';
import type { Principal } from '../credentials.ts';
import type { EventLog } from '../events.ts';
import type { Fleet } from '../fleet.ts';
import type { ImageService } from '../images.ts';
import type { Networks } from '../networks/service.ts';
import type { OperationContext, Operations } from '../operations.ts';
import type { Paths } from '../paths.ts';
import { type ReferenceSets, vmOfSets } from '../references/reference-sets.ts';
import type { Page, PageRequest, Store } from '../store/index.ts';
import type { Managed, VmRegistry } from '../vms/registry.ts';
import type { Runner } from '../vms/runner.ts';
import type { VmService } from '../vms/service.ts';
import { assumedBps, type Forecast, forecast, linkBpsOf, measureDirtyBps, uplinkBpsOf } from './forecast.ts';
import { narrate } from './half.ts';
import { Halves } from './halves.ts';
import { imageHello, sendImage } from './image-transfer.ts';
import { MigrationJournal } from './journal.ts';
import type { LinkLimits } from './link-limits.ts';
import { PeerSide } from './peer-side.ts';
import { endingOf, type MigrationRecord, type SourceRecord, viewOf } from './record.ts';
import { chooseRelays, defaultReplicas } from './relays.ts';

export interface MigrationServiceOptions {
  identity: () => CloudletIdentity;
  store: Store;
  events: EventLog;
  operations: Operations;
  registry: VmRegistry;
  vms: VmService;
  images: ImageService;
  references: ReferenceSets;
  runner: Runner;
  networks: Networks;
  fleet: Fleet;
  linkLimits: LinkLimits;
  isDraining: () => boolean;
  /** A peer sends a golden snapshot. */
  takeSnapshot: (session: Session) => Promise<void>;
  companion: MigrationCompanion;
  paths: Paths;
  log: FastifyBaseLogger;
}

/** Whoever goes along with migrations: learns from them, and brings what belongs to the VM. */
export interface MigrationCompanion {
  /** Both sides agree and nothing is sent yet; what it throws ends the migration before it begins. */
  beforeStart(start: MigrationStart): Promise<void>;
  /** It is over and written; whatever it came to. */
  afterEnd(record: MigrationRecord): void;
  /** Mends a forecast by what was learned. */
  correct(forecast: Forecast, start: Omit<MigrationStart, 'id'>): Forecast;
}

export interface MigrationStart {
  id: Uuid;
  vm: VmToMove;
  options: MigrationOptions;
  peer: Peer;
  hasImage: boolean;
}

type MigrateVm = Static<typeof schemas.MigrateVm>;

/** How long no byte of an image may get through. */
const imagePatienceMs = 60_000;
const imageRetryMs = 1000;

const defaultLimits: MigrationLimits = { downtimeMs: 300, autoConverge: false };

export class MigrationService {
  readonly #options: MigrationServiceOptions;
  readonly #journal: MigrationJournal;
  readonly #peers: PeerSide;
  /** Those at work, and the door for the other cloudlet. */
  readonly halves: Halves;

  constructor(options: MigrationServiceOptions) {
    this.#options = options;
    this.#journal = new MigrationJournal(options.store, (record) => options.companion.afterEnd(record));
    this.#peers = new PeerSide(options);
    this.halves = new Halves({ ...options, journal: this.#journal, peers: this.#peers });
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
    const { managed, peer, vm, options, choice, problems, hasImage, rttMs } = await this.#ask(
      reference,
      request,
    );
    if (problems.length > 0) return { problems };
    const dirtyBps = vm.running ? await measureDirtyBps(managed.machine!.qmp) : 0;
    const linkBps = linkBpsOf(this.#journal.latest(), peer.id);
    const model = forecast({ vm, options, dirtyBps, linkBps, rttMs, sendsImage: !hasImage });
    const { companion } = this.#options;
    return { problems, engine: choice, forecast: companion.correct(model, { vm, options, peer, hasImage }) };
  }

  /** Would it fit there: the checks of both sides and nothing else. */
  async check(reference: string, request: MigrateVm) {
    const { vm, options, peer, problems, hasImage, rttMs } = await this.#ask(reference, request);
    const linkBps = linkBpsOf(this.#journal.latest(), peer.id);
    return { vm, options, peer, problems, hasImage, rttMs, linkBps };
  }

  /** What leaves this cloudlet at the most, and what a peer takes, as far as earlier migrations have shown. */
  ratesTo(peerId: Uuid): { uplinkBps: number; toBps: number } {
    const latest = this.#journal.latest();
    const limitBps = this.#options.linkLimits.cloudletBps ?? Number.POSITIVE_INFINITY;
    const uplinkBps = Math.min(limitBps, uplinkBpsOf(latest) ?? assumedBps);
    return { uplinkBps, toBps: Math.min(uplinkBps, linkBpsOf(latest, peerId) ?? assumedBps) };
  }

  /** Starts a migration and answers with the operation that ends when it has. */
  async start(reference: string, request: MigrateVm): Promise<Operation> {
    const { registry } = this.#options;
    this.#connectEarly(reference, request);
    const { id, managed, peer, vm, options, problems, hasImage } = await this.#ask(reference, request);
    if (problems.length > 0) throw refused(vm, peer, problems);
    await this.#options.companion.beforeStart({ id, vm, options, peer, hasImage });
    registry.require(managed, 'migrate');
    return this.#operate(managed, { id, vm }, async (work) => {
      this.#peers.limits.setMigration(id, options.limits);
      if (!hasImage) await this.#sendImage(peer.id, vm, id, work);
      const { continuity: wanted, device } = request;
      await this.#options.networks.source.prepare({
        id,
        managed,
        peer: { id: peer.id, name: peer.name },
        ...(wanted === undefined ? {} : { wanted }),
        ...(device === undefined ? {} : { device }),
        signal: work.signal,
      });
      const record: SourceRecord = {
        id,
        role: 'source',
        vm,
        options,
        peer: { id: peer.id, name: peer.name },
        createdAt: new Date().toISOString(),
        state: plannedSource(vm.epoch),
        ...(hasImage ? {} : { imageBytes: vm.image.fileBytes }),
      };
      try {
        return await this.#migrate(managed, record, work, (migration) => migration.start());
      } finally {
        // One that came as far as its journal does this at its own end.
        if (!this.#journal.get(id)) await this.#options.networks.source.stayed(id, managed);
      }
    });
  }

  /** For the session that is wanted first, while both sides are asked whether the VM fits. */
  #connectEarly(reference: string, { to, storage }: MigrateVm): void {
    const { registry } = this.#options;
    const managed = registry.find(reference);
    registry.require(managed, 'migrate');
    const { spec } = managed.record;
    const isShared = storage === 'shared' || (storage !== 'copied' && spec.disk.storage !== undefined);
    this.#peers.expect(this.#peers.find(to).id, isShared ? 'memory' : 'disk');
  }

  async #ask(reference: string, request: MigrateVm) {
    const { registry, runner } = this.#options;
    const managed = registry.find(reference);
    registry.require(managed, 'migrate');
    const peer = this.#peers.find(request.to);
    const wantedRelays = request.relays?.map((relay) => this.#peers.find(relay));
    const id = newId();
    const host = await runner.facts();
    const ask = async (storage: MigrationOptions['storage']) => {
      const vm = await this.#vmToMove(managed, storage);
      // For the checks it makes no difference which one it will be.
      const asPlanned = optionsOf(request, storage, 'direct');
      const sentAt = new Date().toISOString();
      const asked = performance.now();
      const missingCpuFeatures = missingCpuFeaturesOf(vm, host);
      const question = {
        vm,
        options: asPlanned,
        qemuVersion: host.qemu.version,
        ...(missingCpuFeatures ? { missingCpuFeatures } : {}),
        sentAt,
      };
      const answer = await this.#peers.check(peer, id, question);
      const rttMs = Math.round(performance.now() - asked);
      const { cloudletBps } = this.#peers.limits;
      const limits = [request.limits?.bandwidthBps, cloudletBps].filter((each) => typeof each === 'number');
      const latest = this.#journal.latest();
      const ofSets = vmOfSets(vm, asPlanned, (each) => runner.diskOf(each));
      let choice = chooseEngine({
        wanted: request.engine ?? 'direct',
        mode: asPlanned.mode,
        channels: asPlanned.channels,
        linkBps: linkBpsOf(latest, peer.id),
        limitBps: limits.length > 0 ? Math.min(...limits) : undefined,
        qemuVersion: host.qemu.version,
        sets: await this.#options.references.inCommon(ofSets, answer.sets ?? []),
        // Post-copy, and memory at others: only for those who leave both to us.
        ...(request.engine === 'auto' && request.mode === undefined && { uplinkBps: uplinkBpsOf(latest) }),
      });
      const found =
        choice.engine === 'relayed'
          ? await chooseRelays(this.#options.fleet, {
              wanted: wantedRelays,
              destination: peer,
              replicas: request.replicas ?? defaultReplicas,
            })
          : undefined;
      // One that nobody asked for is done without.
      if (found && found.problems.length > 0 && request.engine === 'auto') choice = withoutRelays(choice);
      const isRelayed = choice.engine === 'relayed' && found;
      const options = {
        ...optionsOf(request, storage, choice.engine),
        ...(isRelayed ? { relayed: found.relayed } : {}),
      };
      const ofRelays = isRelayed ? found.problems : [];
      const problems = [...answer.problems, ...this.#problemsHere(vm, answer.hasImage), ...ofRelays];
      return { id, managed, peer, vm, options, choice, rttMs, hasImage: answer.hasImage, problems };
    };
    const wanted = request.storage ?? 'auto';
    if (wanted !== 'auto') return ask(wanted);
    if (managed.record.spec.disk.storage === undefined) return ask('copied');
    const shared = await ask('shared');
    return shared.problems.some(({ field }) => field === 'disk.storage') ? ask('copied') : shared;
  }

  /** A VM that came with a disk on shared storage may have no image here that could be sent. */
  #problemsHere({ image, wholeDisk }: VmToMove, hasImage: boolean): Problem[] {
    if (hasImage || !wholeDisk || this.#options.store.images.get(image.digest)) return [];
    const message = `Neither side has the image ${image.digest}, which the disk there would stand on: import it`;
    return [{ field: 'image', value: image.digest, wanted: 'an image that one side has', message }];
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
    const migration = this.halves.beSource(
      managed,
      record,
      ended.resolve,
      ({ phase, doneBytes, totalBytes }) =>
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
    const file = imageFile(this.#options.paths.images, digest, format);
    let lastAt = performance.now();
    const onBytes = (done: number) => {
      lastAt = performance.now();
      progress({ phase: 'image', done, total: fileBytes, unit: 'bytes' });
    };
    for (;;) {
      try {
        const session = await this.#peers.open(peerId, 'image', imageHello(id, vm.image), signal);
        return await sendImage(session, file, { signal, onBytes });
      } catch (error) {
        // A daemon that was started again knows nothing of the session, and has kept the bytes.
        const isLost = ['peer_unreachable', 'interrupted'].includes(asAppError(error).code);
        if (!isLost || performance.now() - lastAt > imagePatienceMs) throw error;
        await sleep(imageRetryMs, undefined, { signal });
      }
    }
  }

  async setLimits(id: Uuid, limits: MigrationLimits): Promise<Static<typeof schemas.Migration>> {
    const record = this.#journal.require(id);
    const migration = this.halves.outgoing.get(id);
    if (!migration) {
      throw new AppError('wrong_state', 'Limits are changed at the source, while the migration runs', {
        state: record.state.name,
        role: record.role,
        allowed: [],
      });
    }
    if (limits.paused && !migration.canBePaused) {
      throw new AppError(
        'wrong_state',
        'The VM stands still for its switchover: nothing may hold it up now',
        {
          action: 'pause',
          state: record.state.name,
          allowed: [],
        },
      );
    }
    // First of all, so that a VM that stops meanwhile finds the pause that it ends.
    this.#journal.update(id, (known) => ({
      ...(known ?? record),
      options: { ...record.options, limits },
    }));
    this.#peers.limits.setMigration(id, limits);
    await migration.setLimits(limits);
    return this.get(id);
  }

  /** An operator's word that the other side will not run the VM; told by an event, for the audit. */
  async claim(reference: string, reason: string, caller: Principal): Promise<void> {
    const { registry, events } = this.#options;
    const managed = registry.find(reference);
    const { record: vm } = managed;
    const record = this.#journal.unfinished().find((each) => each.vm.id === vm.id);
    const migration = record && (this.halves.outgoing.get(record.id) ?? this.halves.incoming.get(record.id));
    if (record && (!migration || managed.silent)) {
      throw new AppError(
        'wrong_state',
        `The QEMU of VM '${vm.name}' does not answer: nobody knows what it does`,
        {
          action: 'claim',
          state: vm.state,
          allowed: [],
        },
      );
    }
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

  // --- life of the daemon

  /** Goes on with what an earlier daemon had begun; the VMs whose QEMU runs have been taken hold of before. */
  async recover(): Promise<void> {
    const { registry, vms, log } = this.#options;
    const unfinished = this.#journal.unfinished();
    for (const record of unfinished) {
      const managed = registry.all().find((each) => each.record.id === record.vm.id);
      if (managed?.silent) this.#takeUpLater(record, managed, managed.silent);
      else this.#takeUp(record);
    }
    // A daemon may die between a VM's record and that of its migration.
    for (const managed of registry.all()) {
      const { id, state, epoch = 1 } = managed.record;
      if (state !== 'migrating' || unfinished.some(({ vm }) => vm.id === id)) continue;
      log.warn({ vmId: id, state }, 'a VM is in no migration any more');
      await vms.settle(managed, { epoch });
    }
  }

  /** What a silent QEMU does nobody knows, so nothing is said or decided about its VM until it answers or has ended. */
  #takeUpLater(record: MigrationRecord, managed: Managed, silent: Promise<void>): void {
    const { paths, log } = this.#options;
    const message =
      'The QEMU of the VM does not answer; the migration goes on when it does, or when its process ends';
    narrate({ ...this.#options, journal: this.#journal }, record).attention(message);
    const machinePathsOf = machinePaths(paths.vm(record.vm.id));
    // What it waits for may be a page of a stream that the daemon before took with it.
    const spare = record.role === 'destination' ? SpareMonitor.open(machinePathsOf) : undefined;
    const waiting =
      spare && record.role === 'destination'
        ? this.halves.beDestination(record, managed, {
            paths: machinePathsOf,
            recover: (socketPath) => spare.recover(socketPath),
          })
        : undefined;
    silent
      .finally(() => spare?.[Symbol.dispose]())
      .then(
        () => {
          this.#journal.noteAttention(record.id, undefined);
          if (!waiting) return this.#takeUp(record);
          managed.operationId = record.id;
          return waiting.answers(managed.machine ?? null);
        },
        // The daemon closes.
        () => {},
      )
      .catch((error) => log.error({ err: error, migrationId: record.id }, 'migration stands still'));
  }

  #takeUp(record: MigrationRecord): void {
    const { registry, log } = this.#options;
    const { id, vm } = record;
    const fields = { migrationId: id, vmId: vm.id };
    log.warn({ ...fields, role: record.role, state: record.state.name }, 'a migration goes on');
    if (mayBeInDoubt(record)) this.#journal.noteAttention(id, undefined);
    const managed = registry.all().find((each) => each.record.id === vm.id);
    const onFailure = (error: unknown) => log.error({ ...fields, err: error }, 'migration stands still');
    if (record.role === 'destination') this.halves.beDestination(record, managed).restart().catch(onFailure);
    else if (!managed) this.halves.beSource(undefined, record).restart().catch(onFailure);
    else
      this.#operate(managed, record, (work) =>
        this.#migrate(managed, record, work, async (migration) => {
          await migration.restart();
          void this.#tellLostSessions(record);
        }),
      );
  }

  /** Until it is heard: QEMU at the other side cannot know that nobody will resume its sessions. */
  async #tellLostSessions({ id, peer }: SourceRecord): Promise<void> {
    while (this.halves.outgoing.has(id)) {
      try {
        return await this.#peers.send(peer.id, id, { name: 'sessions-lost' });
      } catch {
        await sleep(1000, undefined, { ref: false });
      }
    }
  }

  /** Whether it is at work here, as the source or as the destination. */
  isOpen(id: Uuid): boolean {
    return this.halves.outgoing.has(id) || this.halves.incoming.has(id);
  }

  async close(): Promise<void> {
    await this.halves.close();
  }

  /** The record with what is known only while it runs. */
  #live(record: MigrationRecord): MigrationRecord {
    if (record.finishedAt) return record;
    const { outgoing, incoming } = this.halves;
    const progress = outgoing.get(record.id)?.progress ?? incoming.get(record.id)?.mergeProgress;
    return progress ? { ...record, progress } : record;
  }

  async #vmToMove({ record }: Managed, storage: MigrationOptions['storage']): Promise<VmToMove> {
    const { store, runner } = this.#options;
    const { disk } = record.spec;
    const { storage: sharedStorage, ...copiedDisk } = disk;
    // A disk on shared storage needs no image, so there may be none here any more.
    const image = store.images.get(disk.image);
    const { digest, format, fileBytes, virtualBytes } = image ?? unknownImage(disk.image);
    return {
      id: record.id,
      name: record.name,
      spec: storage === 'shared' ? record.spec : { ...record.spec, disk: copiedDisk },
      running: record.state === 'running',
      epoch: record.epoch ?? 1,
      runningWith: record.runningWith ?? 'tcg',
      image: { digest, format, fileBytes, virtualBytes },
      diskBytes: storage === 'shared' ? 0 : await runner.diskBytesOf(record),
      ...(storage === 'copied' && sharedStorage !== undefined ? { wholeDisk: true } : {}),
      ...(record.attachment ? { attachment: record.attachment } : {}),
      ...(record.continuity ? { continuity: record.continuity } : {}),
    };
  }
}

/** What was told of it by an earlier daemon is told again if it still is so. */
const mayBeInDoubt = ({ state }: MigrationRecord): boolean =>
  ['switching', 'waiting', 'owning', 'arrived'].includes(state.name);

const unknownImage = (digest: string): VmToMove['image'] => ({
  digest,
  format: 'qcow2',
  fileBytes: 0,
  virtualBytes: 0,
});

const withoutRelays = ({ reason }: EngineChoice): EngineChoice => ({
  engine: 'condensed',
  reason: `${reason.split(':')[0]}, but too few peers lend memory`,
});

function optionsOf(
  request: MigrateVm,
  storage: MigrationOptions['storage'],
  engine: MigrationEngine,
): MigrationOptions {
  const { channels = 0, mode = engine === 'relayed' ? 'postcopy' : 'precopy' } = request;
  if (engine === 'relayed' && mode === 'precopy') {
    throw new AppError('invalid_request', 'Migrate VM: the mode is precopy with the engine relayed', {
      problems: [{ field: 'body.mode', value: mode, wanted: 'postcopy, hybrid or auto, or another engine' }],
    });
  }
  if (channels > 0 && mode !== 'precopy') {
    throw new AppError(
      'invalid_request',
      `Migrate VM: channels is ${channels} with mode ${mode}, wanted precopy`,
      {
        problems: [{ field: 'body.channels', value: channels, wanted: '0, or the mode precopy' }],
      },
    );
  }
  return {
    // Post-copy cannot be taken back once it has begun, so it is for those who ask for it (or for `auto`).
    mode,
    engine,
    storage,
    limits: { ...defaultLimits, ...request.limits },
    channels,
  };
}

function refused(vm: VmToMove, peer: { name: string }, problems: Problem[]): AppError {
  const list = problems.map(({ message }) => message).join('; ');
  return new AppError('migration_refused', `${peer.name} cannot take VM '${vm.name}': ${list}`, { problems });
}
