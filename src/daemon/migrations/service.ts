/**
 * The migrations of this cloudlet: gives the two halves of `migration/` what they need of the daemon (journal,
 * messages, sessions, QEMU, files), and keeps the VM's record in step with who owns the VM.
 *
 * Messages travel as HTTPS requests between the daemons, since each may be lost, late or repeated; bytes travel in
 * sessions of the link. While a migration is at work on a VM, nothing else is.
 */

import { once } from 'node:events';
import { createReadStream } from 'node:fs';
import { pipeline } from 'node:stream/promises';
import type { FastifyBaseLogger } from 'fastify';
import type { Static } from 'typebox';
import type * as schemas from '../../contract/schemas.ts';
import type { CloudletIdentity } from '../../fleet/index.ts';
import { type AcceptedSession, openSession, type Session, type SessionRequest } from '../../link/index.ts';
import { DestinationMigration } from '../../migration/destination.ts';
import { absentDestination, isDestinationOver } from '../../migration/destination-machine.ts';
import type { Problem, Ticket, ToDestination, ToSource } from '../../migration/protocol.ts';
import { type SessionPurpose, SourceMigration } from '../../migration/source.ts';
import { isSourceOver, plannedSource } from '../../migration/source-machine.ts';
import { AppError, asAppError } from '../../model/errors.ts';
import type { Peer } from '../../model/fleet.ts';
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
import {
  type DestinationRecord,
  endingOf,
  type MigrationRecord,
  type SourceRecord,
  viewOf,
} from './record.ts';

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

/** Short: a message that does not come through is sent again soon. */
const messageTimeoutMs = 3000;
/** A destination that has not answered `prepare` by then is not waited for any longer. */
const prepareTimeoutMs = 120_000;
/** How long a migration that was undone here waits until the other side has cleared up. */
const withdrawTimeoutMs = 60_000;
const defaultLimits: MigrationLimits = { downtimeMs: 300, autoConverge: false };

const purposes = { disk: 'viper-disk/1', memory: 'viper-memory/1' } as const;

export class MigrationService {
  readonly #options: MigrationServiceOptions;
  readonly #outgoing = new Map<Uuid, SourceMigration>();
  readonly #incoming = new Map<Uuid, DestinationMigration>();
  #closed = false;

  constructor(options: MigrationServiceOptions) {
    this.#options = options;
  }

  // --- asked by people

  list(request: PageRequest): Page<Static<typeof schemas.Migration>> {
    const page = this.#options.store.migrations.list(request);
    return { ...page, items: page.items.map((record) => viewOf(this.#live(record))) };
  }

  get(id: Uuid): Static<typeof schemas.Migration> {
    return viewOf(this.#live(this.#require(id)));
  }

  /** The checks of both sides, without moving anything. */
  async plan(
    reference: string,
    request: Static<typeof schemas.MigrateVm>,
  ): Promise<Static<typeof schemas.MigrationPlan>> {
    const { registry } = this.#options;
    const managed = registry.find(reference);
    registry.require(managed, 'migrate');
    const peer = this.#findPeer(request.to);
    const { problems } = await this.#check(peer, newId(), await this.#vmToMove(managed), optionsOf(request));
    return { problems };
  }

  /** Starts a migration and answers with the operation that ends when it has. */
  async start(reference: string, request: Static<typeof schemas.MigrateVm>): Promise<Operation> {
    const { registry, operations } = this.#options;
    const managed = registry.find(reference);
    registry.require(managed, 'migrate');
    const peer = this.#findPeer(request.to);
    const options = optionsOf(request);
    const id = newId();
    const vm = await this.#vmToMove(managed);
    const { problems, hasImage } = await this.#check(peer, id, vm, options);
    if (problems.length > 0) throw refused(vm, peer, problems);
    registry.require(managed, 'migrate');
    const subject = { vmId: vm.id, name: vm.name, migrationId: id };
    const operation = operations.run('vm.migrate', subject, async (work) => {
      try {
        if (!hasImage) await this.#sendImage(peer, vm, id, work);
        const record: SourceRecord = {
          id,
          role: 'source',
          vm,
          options,
          peer: { id: peer.id, name: peer.name },
          createdAt: new Date().toISOString(),
          state: plannedSource(vm.epoch),
        };
        return await this.#migrate(managed, record, work);
      } finally {
        if (managed.operationId === operation.id) delete managed.operationId;
      }
    });
    managed.operationId = operation.id;
    return operation;
  }

  async #migrate(
    managed: Managed,
    record: SourceRecord,
    work: OperationContext,
  ): Promise<Record<string, string>> {
    const { id, peer } = record;
    const migration = this.#beSource(managed, record, (progress) =>
      work.progress({
        phase: progress.phase,
        done: progress.doneBytes,
        total: progress.totalBytes,
        unit: 'bytes',
      }),
    );
    this.#options.registry.update(managed, { state: 'migrating' });
    const onAbort = () => {
      // A daemon that stops lets the migration go on when it is back; only a cancel ends it.
      if ((work.signal.reason as AppError).code === 'cancelled') migration.cancel().catch(() => {});
    };
    work.signal.addEventListener('abort', onAbort);
    const stopped = new Promise<never>((_resolve, reject) => {
      work.signal.addEventListener('abort', () => {
        if ((work.signal.reason as AppError).code !== 'cancelled') reject(work.signal.reason);
      });
    });
    stopped.catch(() => {});
    await migration.start();
    if (work.signal.aborted) onAbort();
    const state = await Promise.race([migration.waitUntilOver(), stopped]);
    if (state.name === 'moved') return { migrationId: id, cloudletId: peer.id, cloudlet: peer.name };
    const ending = endingOf({ ...record, state });
    if (ending?.code === 'refused') throw refused(record.vm, peer, ending.problems ?? []);
    throw new AppError('migration_failed', `VM '${record.vm.name}' was not moved: ${ending?.message}`, {
      migrationId: id,
      reason: ending?.code,
    });
  }

  async setLimits(id: Uuid, limits: MigrationLimits): Promise<Static<typeof schemas.Migration>> {
    const record = this.#require(id);
    const migration = this.#outgoing.get(id);
    if (!migration) {
      throw new AppError('wrong_state', 'Limits are changed at the source, while the migration runs', {
        state: record.state.name,
        role: record.role,
        allowed: [],
      });
    }
    await migration.setLimits(limits);
    this.#put({ ...this.#require(id), options: { ...record.options, limits } } as MigrationRecord);
    return this.get(id);
  }

  /** An operator's word that the other side will not run the VM; told by an event, for the audit. */
  async claim(reference: string, reason: string, caller: Principal): Promise<void> {
    const { registry, events } = this.#options;
    const { record: vm } = registry.find(reference);
    const record = this.#options.store.migrations.unfinished().find((each) => each.vm.id === vm.id);
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
    const { registry, runner, paths, isDraining } = this.#options;
    return checkArrival(vm, {
      isDraining: isDraining(),
      ...(await runner.capacity(paths.root)),
      hasImage: this.#options.store.images.get(vm.image.digest) !== undefined,
      isTaken: (what) => registry.has(what),
      sentAt,
    });
  }

  /** A message about a migration; it is dealt with in its own time. */
  tell(id: Uuid, message: ToDestination | ToSource, caller: Principal): void {
    const { log } = this.#options;
    if (caller.kind !== 'cloudlet') return;
    const from = { id: caller.cloudletId, name: caller.name };
    this.#receive(id, message, from).catch((error) =>
      log.warn({ err: error, migrationId: id }, 'message not taken'),
    );
  }

  async #receive(
    id: Uuid,
    message: ToDestination | ToSource,
    from: { id: Uuid; name: string },
  ): Promise<void> {
    if (this.#closed) return;
    const record = this.#options.store.migrations.get(id);
    if (record && record.peer.id !== from.id) {
      throw new AppError('forbidden', `Cloudlet ${from.name} has no part in migration ${id}`);
    }
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
      const migration = this.#beDestination({
        id,
        role: 'destination',
        vm,
        options,
        peer: from,
        createdAt: new Date().toISOString(),
        state: absentDestination,
      });
      return migration.receive(toDestination);
    }
    if (toDestination.name === 'commit') return this.#send(from.id, id, { name: 'unknown' });
    if (toDestination.name === 'abort') return this.#send(from.id, id, { name: 'gone' });
  }

  /** Takes a session of the link: bytes of a migration by its ticket, or a base image. */
  acceptSession({ purpose, hello, cloudletId }: SessionRequest): AcceptedSession {
    if (purpose === 'viper-image/1') return { onSession: (session) => void this.#takeImage(session) };
    const kind = purpose === purposes.disk ? 'disk' : purpose === purposes.memory ? 'memory' : undefined;
    const migration = this.#incoming.get(String(hello.migrationId));
    const record = this.#options.store.migrations.get(String(hello.migrationId));
    if (!kind || !migration || record?.peer.id !== cloudletId) {
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

  // --- the two halves

  #beSource(
    managed: Managed | undefined,
    record: SourceRecord,
    onProgress: (progress: MigrationProgress) => void = () => {},
  ): SourceMigration {
    const { id, vm, options, peer } = record;
    const { registry, vms, events, log } = this.#options;
    const fields = { migrationId: id, vmId: vm.id, peerId: peer.id };
    let preparingSince = performance.now();
    const migration = new SourceMigration({
      vm,
      options,
      state: record.state,
      machine: managed?.machine ?? null,
      surroundings: {
        journal: { append: (state) => this.#journal(record, state) },
        send: async (message) => {
          const name = migration.state.name;
          const waitedMs = performance.now() - preparingSince;
          if (name === 'preparing' && waitedMs > prepareTimeoutMs) void migration.cancel().catch(() => {});
          if (name === 'withdrawing' && waitedMs > withdrawTimeoutMs) void migration.giveUp().catch(() => {});
          await this.#send(peer.id, id, message);
        },
        openSession: (purpose, ticket, signal) => this.#openSession(peer.id, id, purpose, ticket, signal),
        discard: async () => {
          if (managed) await vms.forget(managed);
        },
        onState: (state) => {
          preparingSince = performance.now();
          log.info({ ...fields, state: state.name }, 'migration');
          events.append({
            kind: `migration.${state.name}`,
            vmId: vm.id,
            data: { migrationId: id, role: 'source', name: vm.name, peer: peer.name },
          });
          if (isSourceOver(state)) void this.#sourceOver(migration, managed, record);
        },
        onProgress: (progress) => {
          onProgress(progress);
        },
        tellOperator: (message) => {
          log.error(fields, message);
          events.append({
            kind: 'migration.attention',
            vmId: vm.id,
            data: { migrationId: id, name: vm.name, message },
          });
        },
        onFailure: (error) => log.error({ ...fields, err: error }, 'migration stands still'),
      },
    });
    this.#outgoing.set(id, migration);
    if (managed && record.state.name !== 'planned') {
      managed.operationId = id;
      registry.update(managed, { state: 'migrating' });
    }
    return migration;
  }

  async #sourceOver(
    migration: SourceMigration,
    managed: Managed | undefined,
    record: SourceRecord,
  ): Promise<void> {
    const { id } = record;
    const { name } = migration.state;
    const now = new Date().toISOString();
    this.#put({
      ...(this.#require(id) as SourceRecord),
      finishedAt: now,
      progress: migration.progress,
      result: migration.result,
    });
    if (managed?.operationId === id) delete managed.operationId;
    if (managed && name === 'ended')
      await this.#options.vms.settle(managed, { epoch: migration.state.epoch });
    this.#outgoing.delete(id);
    await migration.stop();
  }

  #beDestination(record: DestinationRecord, managed?: Managed): DestinationMigration {
    const { id, vm, options, peer } = record;
    const { registry, vms, runner, images, events, log, store } = this.#options;
    const fields = { migrationId: id, vmId: vm.id, peerId: peer.id };
    let arriving = managed;
    const migration = new DestinationMigration({
      vm,
      options,
      state: record.state,
      machine: managed?.machine ?? null,
      surroundings: {
        journal: { append: (state) => this.#journal(record, state) },
        send: (message) => this.#send(peer.id, id, message),
        check: () => this.#problems(vm),
        make: async () => {
          const image = images.get(vm.image.digest);
          arriving = registry.add({
            id: vm.id,
            name: vm.name,
            state: 'arriving',
            spec: vm.spec,
            createdAt: new Date().toISOString(),
            epoch: vm.epoch,
          });
          arriving.operationId = id;
          const { machine, accelerator } = await runner.receive(
            vm,
            image,
            AbortSignal.timeout(prepareTimeoutMs),
          );
          registry.update(arriving, { process: machine.process, runningWith: accelerator });
          vms.attach(arriving, machine);
          return machine;
        },
        discard: async () => {
          if (arriving) await vms.forget(arriving);
        },
        onState: (state) => {
          log.info({ ...fields, state: state.name }, 'migration');
          events.append({
            kind: `migration.${state.name}`,
            vmId: vm.id,
            data: { migrationId: id, role: 'destination', name: vm.name, peer: peer.name },
          });
          if (state.name === 'arrived' && arriving) {
            registry.update(arriving, { state: vm.running ? 'running' : 'paused', epoch: state.epoch });
          }
          if (!isDestinationOver(state)) return;
          if (state.name === 'absent') store.migrations.delete(id);
          else this.#put({ ...this.#require(id), finishedAt: new Date().toISOString() } as DestinationRecord);
          this.#incoming.delete(id);
          if (arriving?.operationId === id) delete arriving.operationId;
          if (arriving && state.name === 'settled') void vms.settle(arriving, { epoch: state.epoch });
          void migration.stop();
        },
        onFailure: (error) => log.error({ ...fields, err: error }, 'migration stands still'),
      },
    });
    this.#incoming.set(id, migration);
    if (arriving) arriving.operationId = id;
    return migration;
  }

  // --- life of the daemon

  /** Goes on with what an earlier daemon had begun; the VMs whose QEMU runs have been taken over before. */
  async recover(): Promise<void> {
    const { store, registry, log } = this.#options;
    for (const record of store.migrations.unfinished()) {
      const managed = registry.all().find((each) => each.record.id === record.vm.id);
      log.warn(
        { migrationId: record.id, vmId: record.vm.id, state: record.state.name },
        'a migration goes on',
      );
      const migration =
        record.role === 'source' ? this.#beSource(managed, record) : this.#beDestination(record, managed);
      migration
        .restart()
        .catch((error) => log.error({ err: error, migrationId: record.id }, 'migration stands still'));
    }
  }

  async close(): Promise<void> {
    this.#closed = true;
    await Promise.all([...this.#outgoing.values(), ...this.#incoming.values()].map((each) => each.stop()));
  }

  // --- hands

  #journal<R extends MigrationRecord>(first: R, state: R['state']): void {
    const known = this.#options.store.migrations.get(first.id) as R | undefined;
    this.#put({ ...(known ?? first), state } as MigrationRecord);
  }

  #put(record: MigrationRecord): void {
    this.#options.store.migrations.put(record);
  }

  #require(id: Uuid): MigrationRecord {
    const record = this.#options.store.migrations.get(id);
    if (record) return record;
    throw new AppError('not_found', `There is no migration ${id}`, { kind: 'migration', name: id });
  }

  /** The record with what is known only while it runs. */
  #live(record: MigrationRecord): MigrationRecord {
    const migration = this.#outgoing.get(record.id);
    return migration ? { ...record, progress: migration.progress } : record;
  }

  #findPeer(reference: string): Peer {
    const found = this.#options.fleet.peers().find(({ id, name }) => id === reference || name === reference);
    if (found) return found;
    throw new AppError('not_found', `There is no peer '${reference}'`, { kind: 'peer', name: reference });
  }

  #peer(id: Uuid): Peer {
    return this.#findPeer(id);
  }

  async #send(peerId: Uuid, id: Uuid, message: ToDestination | ToSource): Promise<void> {
    await this.#options.fleet.client.fetch(this.#peer(peerId), `/v1/migrations/${id}/messages`, {
      method: 'POST',
      json: message,
      timeoutMs: messageTimeoutMs,
    });
  }

  async #check(
    peer: Peer,
    id: Uuid,
    vm: VmToMove,
    options: MigrationOptions,
  ): Promise<Static<typeof schemas.MigrationCheck>> {
    const { qemu } = await this.#options.runner.facts();
    const body: Static<typeof schemas.CheckMigration> = {
      vm,
      options,
      qemuVersion: qemu.version,
      sentAt: new Date().toISOString(),
    };
    const answer = await this.#options.fleet.client.fetch(peer, `/v1/migrations/${id}/check`, {
      method: 'POST',
      json: body,
    });
    const { problems, hasImage } = (answer ?? {}) as Partial<Static<typeof schemas.MigrationCheck>>;
    if (Array.isArray(problems) && typeof hasImage === 'boolean') return { problems, hasImage };
    throw new AppError('peer_unreachable', `${peer.url} did not say whether the VM fits`, { url: peer.url });
  }

  async #openSession(
    peerId: Uuid,
    migrationId: Uuid,
    purpose: SessionPurpose,
    ticket: Ticket,
    signal: AbortSignal,
  ): Promise<Session> {
    return this.#session(peerId, purposes[purpose], { migrationId, secret: ticket.secret }, signal);
  }

  async #session(
    peerId: Uuid,
    purpose: 'viper-disk/1' | 'viper-memory/1' | 'viper-image/1',
    hello: Record<string, string | number>,
    signal: AbortSignal,
  ): Promise<Session> {
    const { identity, fleet } = this.#options;
    const session = await openSession({
      url: this.#peer(peerId).url,
      tls: () => identity().tls,
      expectCloudletId: peerId,
      identify: fleet.identify,
      purpose,
      hello,
      signal,
    });
    session.on('error', () => {});
    return session;
  }

  /** The base image goes first where the destination lacks it; it checks the digest. */
  async #sendImage(peer: Peer, vm: VmToMove, migrationId: Uuid, work: OperationContext): Promise<void> {
    const { digest, format, fileBytes } = vm.image;
    const file = imageFile(this.#options.paths.images, digest, format);
    const session = await this.#session(
      peer.id,
      'viper-image/1',
      { migrationId, digest, format, fileBytes },
      work.signal,
    );
    let sentBytes = 0;
    const counted = async function* (source: AsyncIterable<Buffer>) {
      for await (const chunk of source) {
        sentBytes += chunk.length;
        work.progress({ phase: 'image', done: sentBytes, total: fileBytes, unit: 'bytes' });
        yield chunk;
      }
    };
    session.resume();
    const answered = once(session, 'end', { signal: work.signal });
    await pipeline(createReadStream(file, { highWaterMark: 1024 * 1024 }), counted, session, {
      signal: work.signal,
    });
    // It ends its side when the image is in its store.
    await answered;
  }

  async #takeImage(session: Session): Promise<void> {
    const { images, log } = this.#options;
    session.on('error', () => {});
    const ended = new AbortController();
    session.once('close', () =>
      ended.abort(new AppError('peer_unreachable', 'The session of the image ended')),
    );
    try {
      const { digest, format, fileBytes } = session.hello as {
        digest?: unknown;
        format?: unknown;
        fileBytes?: unknown;
      };
      await images.import(
        session.iterator({ destroyOnReturn: false }) as AsyncIterable<Uint8Array>,
        {
          digest: String(digest),
          format: format === 'raw' ? 'raw' : 'qcow2',
          ...(Number.isSafeInteger(fileBytes) ? { sizeBytes: fileBytes as number } : {}),
        },
        ended.signal,
      );
      session.end();
    } catch (error) {
      log.warn({ err: error, cloudletId: session.cloudletId }, 'an image was not taken');
      session.destroy(asAppError(error));
    }
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

function optionsOf(request: Static<typeof schemas.MigrateVm>): MigrationOptions {
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
