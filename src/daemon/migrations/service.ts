import type { FastifyBaseLogger } from 'fastify';
import type { Static } from 'typebox';
import type * as schemas from '../../contract/schemas.ts';
import type { CloudletIdentity } from '../../fleet/index.ts';
import type { Session } from '../../link/index.ts';
import type { Problem } from '../../migration/protocol.ts';
import type { SourceMigration } from '../../migration/source.ts';
import { plannedSource } from '../../migration/source-machine.ts';
import { AppError } from '../../model/errors.ts';
import type { Peer } from '../../model/fleet.ts';
import type { Uuid } from '../../model/ids.ts';
import type { MigrationLimits, MigrationOptions, VmToMove } from '../../model/migration.ts';
import type { Operation } from '../../model/operation.ts';
import type { RelayHolds } from '../../relay/index.ts';
import { imageFile } from '../../vm/images.ts';
import type { Principal } from '../credentials.ts';
import type { EventLog } from '../events.ts';
import type { Fleet } from '../fleet.ts';
import type { ImageService } from '../images.ts';
import type { Networks } from '../networks/service.ts';
import type { OperationContext, Operations } from '../operations.ts';
import type { Paths } from '../paths.ts';
import type { ReferenceSets } from '../references/reference-sets.ts';
import type { Page, PageRequest, Store } from '../store/index.ts';
import type { Managed, VmRegistry } from '../vms/registry.ts';
import type { Runner } from '../vms/runner.ts';
import type { VmService } from '../vms/service.ts';
import { assumedBps, type Forecast, forecast, linkBpsOf, measureDirtyBps, uplinkBpsOf } from './forecast.ts';
import { Halves } from './halves.ts';
import { imageHello, sendImagePatiently } from './image-transfer.ts';
import { Inquiry } from './inquiry.ts';
import { MigrationJournal } from './journal.ts';
import type { LinkLimits } from './link-limits.ts';
import { PeerSide } from './peer-side.ts';
import { endingOf, type MigrationRecord, type SourceRecord, viewOf } from './record.ts';
import { Recovery } from './recovery.ts';

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

export class MigrationService {
  readonly #options: MigrationServiceOptions;
  readonly #journal: MigrationJournal;
  readonly #peers: PeerSide;
  readonly #inquiry: Inquiry;
  readonly #recovery: Recovery;
  /** Those at work, and the door for the other cloudlet. */
  readonly halves: Halves;

  constructor(options: MigrationServiceOptions) {
    this.#options = options;
    this.#journal = new MigrationJournal(options.store, (record) => options.companion.afterEnd(record));
    this.#peers = new PeerSide(options);
    const parts = { ...options, journal: this.#journal, peers: this.#peers };
    this.#inquiry = new Inquiry(parts);
    this.halves = new Halves(parts);
    this.#recovery = new Recovery({
      ...parts,
      halves: this.halves,
      resume: (managed, record) => this.#resume(managed, record),
    });
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
    const { managed, peer, vm, options, choice, problems, hasImage, rttMs } = await this.#inquiry.ask(
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
    const { vm, options, peer, problems, hasImage, rttMs } = await this.#inquiry.ask(reference, request);
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
    this.#inquiry.connectEarly(reference, request);
    const { id, managed, peer, vm, options, problems, hasImage } = await this.#inquiry.ask(
      reference,
      request,
    );
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

  async #sendImage(peerId: Uuid, { image }: VmToMove, id: Uuid, { signal, progress }: OperationContext) {
    const { digest, format, fileBytes } = image;
    const open = () => this.#peers.open(peerId, 'image', imageHello(id, image), signal);
    const onBytes = (done: number) => progress({ phase: 'image', done, total: fileBytes, unit: 'bytes' });
    await sendImagePatiently(open, imageFile(this.#options.paths.images, digest, format), {
      signal,
      onBytes,
    });
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
  recover(): Promise<void> {
    return this.#recovery.run();
  }

  #resume(managed: Managed, record: SourceRecord): void {
    this.#operate(managed, record, (work) =>
      this.#migrate(managed, record, work, async (migration) => {
        await migration.restart();
        void this.#recovery.tellLostSessions(record);
      }),
    );
  }

  /** A session with a relay, for one that gives slabs of a migration between others on to it. */
  async openRelay(relayId: Uuid, migrationId: Uuid, group: string, holds: RelayHolds): Promise<Session> {
    const session = await this.#peers.openRelay(relayId, migrationId, group, holds);
    session.once('close', () => this.#peers.limits.forget(migrationId));
    return session;
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
}

function refused(vm: VmToMove, peer: { name: string }, problems: Problem[]): AppError {
  const list = problems.map(({ message }) => message).join('; ');
  return new AppError('migration_refused', `VM '${vm.name}' cannot go to ${peer.name}: ${list}`, {
    problems,
  });
}
