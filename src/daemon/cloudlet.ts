/**
 * One cloudlet as a library: everything that the daemon does, without HTTP. This is the composition root; it
 * wires the rooms together and knows nothing else.
 */

import { mkdir, statfs } from 'node:fs/promises';
import { createRequire } from 'node:module';
import type { FastifyBaseLogger } from 'fastify';
import pino from 'pino';
import type { Static } from 'typebox';
import { openApiDocument } from '../contract/openapi.ts';
import type * as schemas from '../contract/schemas.ts';
import { type CloudletIdentity, loadCloudlet } from '../fleet/index.ts';
import type { Storage } from '../model/vm.ts';
import { Taps } from '../network/index.ts';
import { Host } from '../vm/host.ts';
import { run } from '../vm/run.ts';
import { type Config, loadConfig } from './config.ts';
import { Credentials } from './credentials.ts';
import { EscrowService } from './escrow/service.ts';
import { EventLog } from './events.ts';
import { Fleet } from './fleet.ts';
import { Follow } from './follow/service.ts';
import { ImageService } from './images.ts';
import { LogOutput } from './log-output.ts';
import { Metrics } from './metrics.ts';
import { Drain } from './migrations/drain.ts';
import { LinkLimits } from './migrations/link-limits.ts';
import { PeerSide } from './migrations/peer-side.ts';
import { MigrationService } from './migrations/service.ts';
import { Networks } from './networks/service.ts';
import { Operations } from './operations.ts';
import { type Paths, statePaths } from './paths.ts';
import { ImageIndexes } from './references/image-indexes.ts';
import { KeptMemory } from './references/kept-memory.ts';
import { ReferenceSets } from './references/reference-sets.ts';
import { SnapshotIndexes } from './references/snapshot-indexes.ts';
import { RelayService } from './relay/service.ts';
import { SnapshotTransfer } from './snapshot-transfer.ts';
import { SnapshotService } from './snapshots.ts';
import { Store } from './store/index.ts';
import { recoverVms } from './vms/recovery.ts';
import { VmRegistry } from './vms/registry.ts';
import { Runner } from './vms/runner.ts';
import { VmService } from './vms/service.ts';
import { Stalls } from './vms/stalls.ts';
import { VmWatch } from './vms/watch.ts';

export interface OpenOptions {
  /** The state directory, made by `viper init` or `viper join`. */
  directory: string;
  log?: FastifyBaseLogger;
}

export const version: string = createRequire(import.meta.url)('../../package.json').version;

export class Cloudlet implements AsyncDisposable {
  readonly version = version;
  identity: CloudletIdentity;
  readonly config: Config;
  readonly log: FastifyBaseLogger;
  readonly events: EventLog;
  readonly operations: Operations;
  readonly credentials: Credentials;
  readonly images: ImageService;
  readonly indexes: ImageIndexes;
  readonly snapshotIndexes: SnapshotIndexes;
  /** What a migration need not send because both sides hold it. */
  readonly references: ReferenceSets;
  readonly snapshots: SnapshotService;
  readonly snapshotTransfer: SnapshotTransfer;
  readonly vms: VmService;
  readonly migrations: MigrationService;
  readonly drain: Drain;
  /** Memory that is lent to the migrations of others. */
  readonly relay: RelayService;
  /** What is kept for VMs of others, as their custodian. */
  readonly escrows: EscrowService;
  readonly linkLimits: LinkLimits;
  readonly networks: Networks;
  readonly fleet: Fleet;
  readonly follow: Follow;
  readonly host: Host;
  readonly metrics: Metrics;
  /** The OpenAPI document as JSON: made once, it never changes. */
  readonly openApi: string = JSON.stringify(openApiDocument({ version }));
  readonly #store: Store;
  readonly #registry: VmRegistry;
  readonly #watch: VmWatch;
  readonly #runner: Runner;
  readonly #paths: Paths;
  readonly #kept: KeptMemory;
  readonly #taps: Taps;
  readonly #renewals = new Set<(identity: CloudletIdentity) => void>();
  readonly #closing = new AbortController();

  /**
   * Opens the state, takes over the VMs that run, and is then ready. Errors: `not_initialised`, `state_locked`,
   * `state_too_new`, `invalid_request` for a bad config.
   */
  static async open({
    directory,
    log = pino({ level: 'warn' }, new LogOutput()),
  }: OpenOptions): Promise<Cloudlet> {
    const identity = await loadCloudlet(directory);
    const config = await loadConfig(directory);
    const cloudlet = new Cloudlet({ directory, identity, config, log, store: new Store(directory) });
    try {
      await cloudlet.#recover();
      await cloudlet.escrows.recover();
      await cloudlet.migrations.recover();
      await cloudlet.networks.recover((id) => cloudlet.migrations.isOpen(id));
      cloudlet.fleet.start();
      cloudlet.follow.start();
    } catch (error) {
      await cloudlet.close();
      throw error;
    }
    return cloudlet;
  }

  private constructor(parts: {
    directory: string;
    identity: CloudletIdentity;
    config: Config;
    log: FastifyBaseLogger;
    store: Store;
  }) {
    const { identity, config, log, store } = parts;
    const paths = statePaths(parts.directory);
    this.identity = identity;
    this.config = config;
    this.log = log;
    this.#store = store;
    this.host = new Host();
    this.events = new EventLog(store);
    this.#registry = new VmRegistry(store, this.events);
    this.metrics = new Metrics(() => this.#registry.countByState());
    this.operations = new Operations({
      store,
      events: this.events,
      onBug: (error, operation) =>
        log.error({ err: error.cause, operationId: operation.id }, 'operation failed'),
    });
    this.credentials = new Credentials({
      store,
      identifyCloudlet: (certificate) => this.fleet.trust.identify(certificate),
      onRefusal: (reason) => this.metrics.countRefusedCaller(reason),
    });
    this.indexes = new ImageIndexes({ root: paths.images, log });
    this.#kept = new KeptMemory({ root: paths.kept, quotaBytes: config.keptMemoryBytes });
    this.snapshotIndexes = new SnapshotIndexes({ directory: (id) => paths.snapshot(id), log });
    this.references = new ReferenceSets({
      images: this.indexes,
      snapshots: this.snapshotIndexes,
      kept: this.#kept,
      directory: (id) => paths.vm(id),
    });
    this.images = new ImageService({ store, events: this.events, paths, config, indexes: this.indexes });
    this.networks = new Networks({
      identity: () => this.identity,
      config,
      store,
      events: this.events,
      registry: this.#registry,
      fleet: () => this.fleet,
      log,
      run,
    });
    this.#taps = new Taps({
      owner: identity.id,
      networks: config.networks,
      run,
      guard: () => this.networks.guard.update(),
      bridgeFor: (vmId, index) => this.networks.destination.bridgeFor(vmId, index),
    });
    const runner = new Runner({ paths, host: this.host, config, taps: this.#taps });
    const parts_ = {
      events: this.events,
      operations: this.operations,
      images: this.images,
      runner,
      paths,
      config,
    };
    this.snapshots = new SnapshotService({
      ...parts_,
      store,
      indexes: this.snapshotIndexes,
      usersOf: (id) => this.#registry.startingFrom(id),
    });
    const stalls = new Stalls({ ...parts_, log, closing: this.closing });
    this.#watch = new VmWatch({ ...parts_, registry: this.#registry, stalls, log, closing: this.closing });
    this.vms = new VmService({
      ...parts_,
      registry: this.#registry,
      watch: this.#watch,
      snapshots: this.snapshots,
      kept: this.#kept,
      networks: this.networks,
      refuseIfDraining: () => this.drain.refuseIfDraining(),
      metrics: this.metrics,
    });
    this.fleet = new Fleet({
      identity,
      store,
      events: this.events,
      log,
      onRenewed: (renewed) => {
        this.identity = renewed;
        this.#renewals.forEach((listener) => {
          listener(renewed);
        });
      },
    });
    this.follow = new Follow({
      identity: () => this.identity,
      config,
      store,
      events: this.events,
      operations: this.operations,
      credentials: this.credentials,
      registry: this.#registry,
      fleet: this.fleet,
      migrations: () => this.migrations,
      vms: () => this.vms,
      run,
      log,
    });
    this.linkLimits = new LinkLimits(store, config.migrationBandwidthBps);
    this.snapshotTransfer = new SnapshotTransfer({
      ...parts_,
      store,
      snapshots: this.snapshots,
      peers: new PeerSide({
        identity: () => this.identity,
        fleet: this.fleet,
        linkLimits: this.linkLimits,
      }),
    });
    this.migrations = new MigrationService({
      linkLimits: this.linkLimits,
      takeSnapshot: (session) => this.snapshotTransfer.take(session),
      identity: () => this.identity,
      store,
      events: this.events,
      operations: this.operations,
      registry: this.#registry,
      vms: this.vms,
      images: this.images,
      references: this.references,
      runner,
      networks: this.networks,
      fleet: this.fleet,
      isDraining: () => this.drain.isDraining,
      companion: this.follow,
      paths,
      log,
    });
    this.escrows = new EscrowService({
      ...parts_,
      cloudletId: identity.id,
      store,
      registry: this.#registry,
      vms: this.vms,
      fleet: this.fleet,
      peers: new PeerSide({ identity: () => this.identity, fleet: this.fleet, linkLimits: this.linkLimits }),
      fit: (vm, options) => this.migrations.halves.fit(vm, options),
      log,
    });
    this.relay = new RelayService({
      store,
      events: this.events,
      configured: { memory: config.relayMemoryBytes, disk: config.relayDiskBytes },
      directory: paths.relay,
      reserveBytes: config.reserveBytes,
      isDraining: () => this.drain.isDraining,
      nameOf: (id) => this.fleet.peers().find((peer) => peer.id === id)?.name,
      openRelay: (...wanted) => this.migrations.openRelay(...wanted),
    });
    this.drain = new Drain({
      store,
      events: this.events,
      operations: this.operations,
      registry: this.#registry,
      migrations: this.migrations,
      fleet: this.fleet,
      nearness: (vmId) => this.follow.nearness(vmId),
    });
    this.#runner = runner;
    this.#paths = paths;
  }

  async #recover(): Promise<void> {
    const paths = this.#paths;
    for (const each of [paths.images, paths.vms, paths.snapshots, paths.escrows])
      await mkdir(each, { recursive: true, mode: 0o700 });
    await this.images.recover();
    await this.#kept.recover();
    this.snapshots.recover();
    await recoverVms({
      registry: this.#registry,
      watch: this.#watch,
      runner: this.#runner,
      paths,
      knowsSnapshot: (id) => this.#store.snapshots.get(id) !== undefined,
      log: this.log,
    });
    const strays = await this.#taps.removeStrays(this.#registry.all().map(({ record }) => record.id));
    if (strays.length > 0) this.log.warn({ taps: strays }, 'removed taps of VMs that are gone');
  }

  /** Aborts when the cloudlet closes: for work that lives as long as it. */
  get closing(): AbortSignal {
    return this.#closing.signal;
  }

  /** For whoever serves with the certificate of the cloudlet: it changes about once a year. */
  onRenewed(listener: (identity: CloudletIdentity) => void): void {
    this.#renewals.add(listener);
  }

  async facts(): Promise<Static<typeof schemas.Cloudlet>> {
    const [host, disk] = await Promise.all([this.host.facts(), statfs(this.#paths.root)]);
    const counts = this.#registry.countByState();
    return {
      id: this.identity.id,
      name: this.identity.name,
      url: this.identity.url,
      fleetId: this.identity.fleetId,
      version: this.version,
      accelerator: host.accelerator,
      qemuVersion: host.qemu.version,
      cpus: host.cpus,
      memory: { totalBytes: host.memory.totalBytes, freeBytes: host.memory.availableBytes },
      disk: { totalBytes: disk.blocks * disk.bsize, freeBytes: disk.bavail * disk.bsize },
      limits: { bandwidthBps: this.linkLimits.cloudletBps },
      relay: {
        memoryBytes: this.relay.status.memoryBytes,
        freeBytes: this.relay.freeBytes('memory'),
        freeDiskBytes: this.relay.freeBytes('disk'),
      },
      draining: this.drain.isDraining,
      networks: this.config.networks.map(({ name, kind }) => ({ name, kind })),
      storages: this.config.storages.map((storage) => ({ name: storage.name, kind: kindOf(storage) })),
      vms: { total: this.#registry.all().length, running: counts.get('running') ?? 0 },
    };
  }

  /** Lets go of everything; the guests run on. */
  async close(): Promise<void> {
    this.#closing.abort();
    await this.operations.close();
    await this.migrations.close();
    this.relay.close();
    await this.indexes.close();
    await this.snapshotIndexes.close();
    this.networks.close();
    this.#watch.detach();
    await this.follow.close();
    await this.fleet.close();
    this.events.close();
    this.#store.close();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }
}

function kindOf(storage: Storage): 'path' | 'nfs' | 'gluster' {
  if ('path' in storage) return 'path';
  return storage.url.startsWith('nfs:') ? 'nfs' : 'gluster';
}
