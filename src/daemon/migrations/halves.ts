/**
 * The migrations at work on this cloudlet, each as its source or as its destination, and what the other cloudlet of
 * each asks, says and sends.
 */
import type { Static } from 'typebox';
import type * as schemas from '../../contract/schemas.ts';
import type { AcceptedSession, Session, SessionRequest } from '../../link/index.ts';
import type { DestinationMigration } from '../../migration/destination.ts';
import { absentDestination } from '../../migration/destination-machine.ts';
import { checkFit, type Preflight, qemuFactsOf } from '../../migration/preflight.ts';
import type { Merged, ToDestination, ToSource } from '../../migration/protocol.ts';
import { Pools } from '../../migration/relayed/pools.ts';
import type { SourceMigration } from '../../migration/source.ts';
import type { SilentQemu } from '../../migration/streams-in.ts';
import { AppError, asAppError } from '../../model/errors.ts';
import type { Uuid } from '../../model/ids.ts';
import type { MigrationOptions, MigrationProgress, VmToMove } from '../../model/migration.ts';
import type { Principal } from '../credentials.ts';
import { vmOfSets } from '../references/reference-sets.ts';
import type { Store } from '../store/index.ts';
import type { Managed } from '../vms/registry.ts';
import { makeDestination } from './destination-half.ts';
import type { HalfParts } from './half.ts';
import { HeapPolicy } from './heap-policy.ts';
import { takeImage } from './image-transfer.ts';
import { linkPurposes, type Message } from './peer-side.ts';
import type { DestinationRecord, MigrationRecord, SourceRecord } from './record.ts';
import { makeSource } from './source-half.ts';

/** The most that a question may have been under way; peers are far nearer than this. */
const questionMs = 2000;

export interface HalvesOptions extends HalfParts {
  store: Store;
  isDraining: () => boolean;
  takeSnapshot: (session: Session) => Promise<void>;
}

export class Halves {
  readonly outgoing = new Map<Uuid, SourceMigration>();
  readonly incoming = new Map<Uuid, DestinationMigration>();
  readonly #options: HalvesOptions;
  /** Those that brought bytes of a VM, by its migration. */
  readonly #sessions = new Map<Uuid, Set<Session>>();
  readonly #heap = new HeapPolicy();
  readonly #pools = new Pools();
  #closed = false;

  constructor(options: HalvesOptions) {
    this.#options = options;
  }

  beSource(
    managed: Managed | undefined,
    record: SourceRecord,
    onEnd: () => void = () => {},
    onProgress: (progress: MigrationProgress) => void = () => {},
  ): SourceMigration {
    const onOver = () => {
      this.outgoing.delete(record.id);
      this.#setPace();
      onEnd();
    };
    const migration = makeSource(this.#options, record, managed, { onProgress, pools: this.#pools, onOver });
    this.outgoing.set(record.id, migration);
    this.#setPace();
    return migration;
  }

  /** `silent`: the QEMU of `found`, which does not answer yet. */
  beDestination(record: DestinationRecord, found?: Managed, silent?: SilentQemu): DestinationMigration {
    const { id, vm } = record;
    if (found && !silent) found.operationId = id;
    const hooks = {
      check: async () => (await this.fit(vm, record.options)).problems,
      onOver: () => {
        this.incoming.delete(id);
        this.#setPace();
      },
    };
    const migration = makeDestination(this.#options, record, { found, silent }, hooks);
    this.incoming.set(id, migration);
    this.#setPace();
    return migration;
  }

  #setPace(): void {
    this.#heap.favourSpeed(this.outgoing.size + this.incoming.size > 0);
  }

  /** What does not fit for a VM to come here; all of it at once. */
  async check(body: Static<typeof schemas.CheckMigration>): Promise<Static<typeof schemas.MigrationCheck>> {
    // The question was on its way for a part of the difference.
    const clock = { offsetMs: Date.now() - Date.parse(body.sentAt), uncertaintyMs: questionMs };
    const { problems, imageToSend } = await this.fit(body.vm, body.options, body, clock);
    const { references, runner } = this.#options;
    const sets = await references.setsFor(vmOfSets(body.vm, body.options, (vm) => runner.diskOf(vm)));
    const { canPostcopy } = (await runner.facts()).qemu;
    return { problems, hasImage: !imageToSend, canPostcopy, sets };
  }

  /** Without the source's word its QEMU and its clock count as ours. */
  async fit(
    vm: VmToMove,
    options: MigrationOptions,
    told: { qemuVersion?: string; missingCpuFeatures?: string[] } = {},
    clock = { offsetMs: 0, uncertaintyMs: 0 },
  ): Promise<Preflight> {
    const { registry, runner, paths, isDraining, store } = this.#options;
    const { host, networks, freeMemoryBytes, freeDiskBytes } = await runner.capacity(paths.root);
    const image = store.images.get(vm.image.digest);
    const source = {
      qemu: { version: told.qemuVersion ?? host.qemu.version },
      missingCpuFeatures: told.missingCpuFeatures ?? host.qemu.missingCpuFeatures[vm.spec.cpu.model] ?? [],
    };
    const { problems, imageToSend } = checkFit(vm, options, source, {
      qemu: qemuFactsOf(host),
      featuresWith: host.accelerator,
      accelerators: host.accelerator === 'kvm' ? ['kvm', 'tcg'] : ['tcg'],
      memory: { freeBytes: freeMemoryBytes },
      disk: { freeBytes: freeDiskBytes },
      images: image ? [image.digest] : [],
      storages: runner.storages,
      seesDisk: options.storage === 'copied' || (await runner.seesDiskOf(vm).catch(() => false)),
      networks: networks.map(({ name }) => name),
      vms: registry.all().map(({ record: { id, name } }) => ({ id, name })),
      clock,
    });
    if (isDraining()) {
      const message = 'The cloudlet is drained and takes no VMs';
      problems.unshift({ field: 'cloudlet', value: 'drained', wanted: 'undrained', message });
    }
    return { problems, imageToSend };
  }

  /** A message about a migration; it is dealt with in its own time. */
  tell(id: Uuid, message: Message, caller: Principal): void {
    if (caller.kind !== 'cloudlet' || this.#closed) return;
    this.#receive(id, message, { id: caller.cloudletId, name: caller.name }).catch((error) =>
      this.#options.log.warn({ err: error, migrationId: id }, 'message not taken'),
    );
  }

  async #receive(id: Uuid, message: Message, from: MigrationRecord['peer']): Promise<void> {
    const record = this.#options.journal.get(id);
    if (record && record.peer.id !== from.id)
      throw new AppError('forbidden', `Cloudlet ${from.name} has no part in migration ${id}`);
    const isAtWork = this.outgoing.has(id) || this.incoming.has(id);
    // Its QEMU does not answer yet; what is said meanwhile will be said again.
    if (record && !record.finishedAt && !isAtWork) return;
    if (message.name === 'merged') return this.#merged(id, record, message);
    if (record?.role === 'source') {
      // One that has ended still answers a destination that asks what became of it.
      const migration = this.outgoing.get(id) ?? this.beSource(undefined, record);
      return migration.receive(message as ToSource);
    }
    if (message.name === 'sessions-lost') return this.#loseSessions(id);
    const toDestination = message as ToDestination;
    const known = this.incoming.get(id);
    if (known) return known.receive(toDestination);
    if (toDestination.name === 'prepare') {
      const { vm, options } = toDestination;
      const createdAt = new Date().toISOString();
      const state = absentDestination;
      const common = { id, vm, options, peer: from, createdAt };
      return this.beDestination({ ...common, role: 'destination', state }).receive(toDestination);
    }
    if (toDestination.name === 'commit') return this.#options.peers.send(from.id, id, { name: 'unknown' });
    if (toDestination.name === 'abort') return this.#options.peers.send(from.id, id, { name: 'gone' });
  }

  /** The VM is whole, some time after it had left here. */
  async #merged(id: Uuid, record: MigrationRecord | undefined, message: Merged) {
    if (record?.role !== 'source') return;
    // It may come while the last of it is put away here.
    await this.outgoing.get(id)?.waitUntilOver();
    this.#options.journal.merged(id, message);
  }

  /** Takes a session of the link: bytes of a migration by its ticket, or a base image. */
  acceptSession({ purpose, hello, cloudletId }: SessionRequest): AcceptedSession {
    const { images, log, takeSnapshot } = this.#options;
    if (purpose === linkPurposes.image) {
      const onFailure = (error: unknown) => log.warn({ err: error, cloudletId }, 'an image was not taken');
      return { onSession: (session) => void takeImage(session, images).catch(onFailure) };
    }
    if (purpose === linkPurposes.snapshot) {
      const onFailure = (error: unknown) => log.warn({ err: error, cloudletId }, 'a snapshot was not taken');
      return { onSession: (session) => void takeSnapshot(session).catch(onFailure) };
    }
    const id = String(hello.migrationId);
    const migration = this.incoming.get(id);
    const kind = (['disk', 'memory'] as const).find((each) => linkPurposes[each] === purpose);
    if (!kind || !migration || this.#options.journal.get(id)?.peer.id !== cloudletId) {
      throw new AppError('forbidden', `There is no migration that waits for this ${purpose} session`, {
        wanted: 'ticket',
      });
    }
    return {
      onSession: (session) => {
        session.on('error', () => {});
        this.#keep(id, session);
        try {
          migration.accept(kind, String(hello.secret), session);
        } catch (error) {
          session.destroy(asAppError(error));
        }
      },
    };
  }

  #keep(id: Uuid, session: Session): void {
    const sessions = this.#sessions.get(id) ?? new Set();
    this.#sessions.set(id, sessions);
    sessions.add(session);
    session.once('close', () => {
      sessions.delete(session);
      if (sessions.size === 0) this.#sessions.delete(id);
    });
  }

  /** QEMU then notices at once, and does not wait as long as a cut of the link may last. */
  #loseSessions(id: Uuid): void {
    const reason = new AppError('peer_unreachable', 'The daemon at the source was started again');
    for (const session of this.#sessions.get(id) ?? []) session.destroy(reason);
  }

  async close(): Promise<void> {
    this.#closed = true;
    await Promise.all([...this.outgoing.values(), ...this.incoming.values()].map((each) => each.stop()));
  }
}
