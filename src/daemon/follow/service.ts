/**
 * VMs follow their devices: watches the devices whose VMs are here, decides when something has happened to one, acts
 * by starting a migration, and keeps every decision with what it came to. It also goes along with migrations that
 * others start: a device is handed over ahead of its VM, and forecasts learn from each.
 */
import { isIPv4 } from 'node:net';
import type { FastifyBaseLogger } from 'fastify';
import type { Static } from 'typebox';
import type * as schemas from '../../contract/schemas.ts';
import type { CloudletIdentity } from '../../fleet/index.ts';
import { type Fired, ownerOfAddress } from '../../follow/index.ts';
import { AppError, asAppError } from '../../model/errors.ts';
import type { Decision, DeviceRecord, Trigger } from '../../model/follow.ts';
import type { Uuid } from '../../model/ids.ts';
import type { Run } from '../../network/index.ts';
import type { Config } from '../config.ts';
import type { Credentials, Principal } from '../credentials.ts';
import type { EventLog } from '../events.ts';
import type { Fleet } from '../fleet.ts';
import { type Forecast, forecast, measureDirtyBps } from '../migrations/forecast.ts';
import type { MigrationRecord } from '../migrations/record.ts';
import type { MigrationCompanion, MigrationService, MigrationStart } from '../migrations/service.ts';
import type { Operations } from '../operations.ts';
import type { Page, PageRequest, Store } from '../store/index.ts';
import type { Managed, VmRegistry } from '../vms/registry.ts';
import type { VmService } from '../vms/service.ts';
import { DeviceWatch } from './device-watch.ts';
import { type DeviceReport, Devices } from './devices.ts';
import { Echo } from './echo.ts';
import { askForFresh, freshVmFor } from './fresh-service.ts';
import { type GroupsInput, splitsWithout } from './groups.ts';
import { LoadWatch } from './load-watch.ts';
import { NearnessDesk } from './nearness.ts';
import { Neighbours } from './neighbours.ts';
import { Placement } from './placement.ts';
import { Profiles, queryOf } from './profiles.ts';
import { serviceInitiationMs } from './service-initiation.ts';
import { lansOf } from './sightings.ts';
import { Vpn } from './vpn.ts';

export interface FollowOptions {
  identity: () => CloudletIdentity;
  config: Config;
  store: Store;
  events: EventLog;
  operations: Operations;
  credentials: Credentials;
  registry: VmRegistry;
  fleet: Fleet;
  migrations: () => MigrationService;
  vms: () => VmService;
  run: Run;
  log: FastifyBaseLogger;
}

const syncEveryMs = 1000;
const dirtyEveryMs = 60_000;

export class Follow implements MigrationCompanion {
  readonly devices: Devices;
  readonly neighbours: Neighbours;
  readonly profiles: Profiles;
  readonly echo: Echo;
  readonly desk: NearnessDesk;
  readonly load: LoadWatch;
  readonly #vpn: Vpn;
  #groupsBefore: GroupsInput | undefined;
  readonly #options: FollowOptions;
  readonly #watches = new Map<Uuid, DeviceWatch>();
  readonly #dirty = new Map<Uuid, { bps: number; atMs: number }>();
  /** RTTs to devices while their VMs are on the way, against that before. */
  readonly #before = new Map<Uuid, number>();
  #placement: Placement | undefined;
  #timer: NodeJS.Timeout | undefined;
  #closed = false;

  constructor(options: FollowOptions) {
    const { store, fleet, identity, config, log } = options;
    this.#options = options;
    this.devices = new Devices(options);
    this.profiles = new Profiles(store);
    this.echo = new Echo({ ownId: identity().id, isPeer: (id) => fleet.directory.get(id) !== undefined });
    this.load = new LoadWatch({
      registry: options.registry,
      policy: config.follow.load,
      onTrigger: (trigger, vmId) => this.#relieve(trigger, vmId),
    });
    this.desk = new NearnessDesk(
      config.networks,
      () => serviceInitiationMs(store),
      () => this.load.now,
    );
    this.#vpn = new Vpn({ ...options, groups: () => this.groups() });
    this.neighbours = new Neighbours({
      fleet,
      store,
      log,
      echo: this.echo,
      config: config.follow,
      greeting: () => this.#greeting(),
    });
  }

  start(): void {
    this.neighbours.start();
    this.load.start();
    this.#vpn.start();
    this.#timer = setInterval(() => this.sync(), syncEveryMs);
    this.#timer.unref();
    this.sync();
    if (this.profiles.isYoung) void this.#learnFromPeers();
  }

  // --- what is known

  lans(): string[] {
    const { config } = this.#options;
    return config.follow.lans ?? lansOf(config.networks);
  }

  /** What the VPN groups are made from. */
  groups(): GroupsInput {
    const { identity, config } = this.#options;
    return {
      identity: identity(),
      config: config.follow,
      lans: this.lans(),
      peers: this.neighbours.all(),
    };
  }

  /** Who has left the fleet may have held a VPN group together. */
  #tellSplits(): void {
    const { config, events } = this.#options;
    if (!config.follow.site) return;
    const [before, now] = [this.#groupsBefore, this.groups()];
    this.#groupsBefore = now;
    const present = new Set(now.peers.map(({ peer }) => peer.id));
    for (const { peer } of before?.peers ?? []) {
      if (present.has(peer.id)) continue;
      for (const { group, parts } of splitsWithout(before!, peer.id))
        events.append({ kind: 'group.split', data: { group, left: peer.name, parts } });
    }
  }

  #greeting() {
    const { site, wireguard } = this.#options.config.follow;
    const { publicKey = '', host = '', port = 0, address = '' } = wireguard ?? {};
    return {
      lans: this.lans(),
      ...(site ? { site } : {}),
      ...(wireguard ? { wireguard: { publicKey, host, port, address } } : {}),
    };
  }

  /** The cloudlet in whose LAN the addresses are. */
  #lanOf(addresses: readonly string[]): Uuid | undefined {
    const own = { cloudletId: this.#options.identity().id, lans: this.lans() };
    const others = this.neighbours.all().map(({ neighbour }) => neighbour);
    for (const address of addresses) {
      const owner = ownerOfAddress(address, [own, ...others]);
      if (owner !== undefined) return owner;
    }
    return undefined;
  }

  view(device: DeviceRecord): Static<typeof schemas.Device> {
    const { id, name, createdAt, macs, addresses, reportedAt } = device;
    const { here, at } = this.devices.vmOf(device);
    const watch = this.#watches.get(id);
    const lan = this.#lanOf(addresses);
    return {
      id,
      name,
      createdAt,
      macs,
      addresses,
      ...(here ? { vm: here } : {}),
      vmIsHere: here !== undefined,
      ...(at ? { vmAt: at } : {}),
      ...(watch && watch.rtt.samples > 0 ? { rttMs: rounded(watch.rtt.smoothedMs) } : {}),
      ...(watch ? { lossRatio: rounded(watch.rtt.lossRatio) } : {}),
      ...(here ? { lan: lan === undefined ? null : { id: lan, name: this.#nameOf(lan) } } : {}),
      ...(reportedAt ? { reportedAt } : {}),
    };
  }

  #nameOf(cloudletId: Uuid): string {
    const { identity, fleet } = this.#options;
    return cloudletId === identity().id
      ? identity().name
      : (fleet.directory.get(cloudletId)?.name ?? cloudletId);
  }

  /** For the device itself. */
  status(device: DeviceRecord): Static<typeof schemas.DeviceStatus> {
    const { id, name, url } = this.#options.identity();
    const near = this.neighbours.all().filter(({ standing }) => standing === 'neighbour');
    const managed = this.#options.registry.all().find(({ record }) => record.id === device.vmId);
    const address = managed?.record.attachment?.place.address.split('/')[0];
    return {
      device: this.view(device),
      cloudlet: { id, name, url },
      neighbours: near.slice(0, 32).map(({ peer }) => ({ id: peer.id, name: peer.name, url: peer.url })),
      ...(address === undefined ? {} : { vmAddress: address }),
    };
  }

  decisions(request: PageRequest): Page<Decision> {
    return this.#options.store.decisions.list(request);
  }

  decision(id: Uuid): Decision {
    const found = this.#options.store.decisions.get(id);
    if (found) return found;
    throw new AppError('not_found', `There is no decision ${id}`, { kind: 'decision', name: id });
  }

  // --- devices

  /** A device tells of itself; what follows from that is under way when this returns. */
  report(caller: Principal, report: DeviceReport): Static<typeof schemas.DeviceStatus> {
    const device = this.devices.report(this.devices.ofCaller(caller), report);
    this.sync();
    this.#watches.get(device.id)?.report(this.#lanOf(device.addresses), report.rtts ?? []);
    return this.status(device);
  }

  /** Brings the watches in line with devices and VMs: watched is a device whose VM runs here. */
  sync(): void {
    if (this.#closed) return;
    this.#tellSplits();
    const { registry, store, identity, config } = this.#options;
    const running = new Map(registry.all().map((managed) => [managed.record.id, managed]));
    for (const device of this.devices.all()) {
      const managed = device.vmId === undefined ? undefined : running.get(device.vmId);
      const { state } = managed?.record ?? {};
      const isHere = state === 'running' || state === 'paused' || state === 'migrating';
      if (!managed || !isHere) {
        this.#unwatch(device.id);
        continue;
      }
      let watch = this.#watches.get(device.id);
      if (!watch) {
        const last = store.migrations.lastOf(managed.record.id);
        watch = new DeviceWatch({
          ownId: identity().id,
          policy: config.follow,
          watchEveryMs: config.follow.watchEveryMs,
          movedAtMs: last && Date.parse(last.createdAt),
          onTrigger: (fired) => this.#think(device.id, fired),
        });
        this.#watches.set(device.id, watch);
        watch.report(this.#lanOf(device.addresses), []);
      }
      watch.follow(config.follow.deviceRtt === 'ping' ? device.addresses[0] : undefined);
      this.#measureDirty(managed);
    }
    for (const id of this.#watches.keys())
      if (!this.devices.all().some((device) => device.id === id)) this.#unwatch(id);
  }

  #unwatch(deviceId: Uuid): void {
    this.#watches.get(deviceId)?.[Symbol.dispose]();
    this.#watches.delete(deviceId);
  }

  /** A decision must not wait for it, so it is measured now and then. */
  #measureDirty({ record, machine, operationId }: Managed): void {
    const known = this.#dirty.get(record.id);
    if (!machine || operationId || record.state !== 'running') return;
    if (known && Date.now() - known.atMs < dirtyEveryMs) return;
    this.#dirty.set(record.id, { bps: known?.bps ?? 0, atMs: Date.now() });
    measureDirtyBps(machine.qmp).then(
      (bps) => this.#dirty.set(record.id, { bps, atMs: Date.now() }),
      () => {},
    );
  }

  // --- decisions

  /** Where the VM should be, without doing anything. Errors: `not_found`. */
  async placement(reference: string): Promise<Decision> {
    const managed = this.#options.registry.find(reference);
    const device = this.devices.ofVm(managed.record.id);
    const trigger = { kind: 'asked', message: 'Somebody asked' } as const;
    return (await this.#place.decide(managed, device, trigger, this.#observed(device))).decision;
  }

  /** RTT to the VM's device from each peer that answers, for whoever chooses among them. */
  async nearness(vmId: Uuid): Promise<Map<Uuid, number>> {
    const device = this.devices.ofVm(vmId);
    return device ? this.#place.nearness(device) : new Map();
  }

  get #place(): Placement {
    const { config, migrations } = this.#options;
    this.#placement ??= new Placement({
      ...this.#options,
      config: config.follow,
      neighbours: this.neighbours,
      profiles: this.profiles,
      migrations: migrations(),
      dirtyBpsOf: (vmId) => this.#dirty.get(vmId)?.bps ?? 0,
    });
    return this.#placement;
  }

  #observed(device: DeviceRecord | undefined) {
    const watch = device && this.#watches.get(device.id);
    return watch && { rtt: watch.rtt, reported: watch.reported() };
  }

  async #think(deviceId: Uuid, fired: Fired): Promise<{ moved: boolean }> {
    const { registry, config, log } = this.#options;
    const device = this.devices.find(deviceId);
    const managed = registry.all().find(({ record }) => record.id === device.vmId);
    if (config.follow.mode === 'off' || !managed || managed.operationId) return { moved: false };
    const message = fired.kind === 'lan' ? this.#tellLan(fired.message) : fired.message;
    const observed = this.#observed(device);
    const { decision, sightedAt } = await this.#place.decide(
      managed,
      device,
      { ...fired, message },
      observed,
    );
    if (this.#closed) return { moved: false };
    // It has changed its address without telling anybody.
    if (fired.kind === 'lost' && sightedAt !== undefined && !device.addresses.includes(sightedAt))
      this.devices.report(device, { addresses: [sightedAt, ...device.addresses].slice(0, 8) });
    // A device that is nowhere is looked for again and again: that is told once it is found.
    if (fired.kind !== 'lost' || decision.outcome !== 'stay') this.#keep(decision);
    log.info(
      { vmId: decision.vm.id, deviceId, outcome: decision.outcome, reasons: decision.reasons },
      'decided',
    );
    if (config.follow.mode !== 'act') return { moved: false };
    return this.act(decision, managed);
  }

  /** This cloudlet is too busy: one VM goes. */
  async #relieve(trigger: Trigger, vmId: Uuid): Promise<boolean> {
    const { registry, config } = this.#options;
    const managed = registry.all().find(({ record }) => record.id === vmId);
    const { mode } = config.follow.load;
    if (mode === 'off' || !managed || managed.operationId) return false;
    const decision = await this.#place.decideByLoad(managed, trigger);
    if (this.#closed) return false;
    this.#keep(decision);
    return mode === 'act' && (await this.act(decision, managed)).moved;
  }

  #tellLan(message: string): string {
    return message.replace(/[0-9a-f-]{36}/, (id) => this.#nameOf(id));
  }

  /** Does what was decided; gives whether a migration was started. */
  async act(decision: Decision, managed: Managed): Promise<{ moved: boolean }> {
    const { migrations, operations, events, config } = this.#options;
    const { outcome, target, device } = decision;
    if (outcome === 'stay' || !target) return { moved: false };
    if (outcome === 'fresh') {
      if (device && config.follow.freshService === 'act') return this.#replace(decision, managed, device.id);
      const data = {
        deviceId: device?.id,
        cloudletId: target.id,
        name: target.name,
        decisionId: decision.id,
      };
      events.append({ kind: 'device.fresh-service-advised', vmId: decision.vm.id, data });
      return { moved: false };
    }
    try {
      const { addresses = [] } = device ? this.devices.find(device.id) : {};
      const there = addresses.find((address) => isIPv4(address) && this.#lanOf([address]) === target.id);
      const request = this.#place.requestFor(target.id, there);
      const operation = await migrations().start(managed.record.id, request);
      const { migrationId } = operation.subject;
      const acted = {
        ...decision,
        acted: true,
        operationId: operation.id,
        ...(migrationId && { migrationId }),
      };
      this.#keep(acted);
      void operations.wait(operation.id).then(({ error }) => this.#ended(acted, error?.message));
      return { moved: true };
    } catch (error) {
      const { message } = asAppError(error);
      this.#keep({ ...decision, acted: true, result: { moved: false, message } });
      // What was tried counts as moved, so that it is not tried again before the cool-down is over.
      return { moved: true };
    }
  }

  /** A fresh VM there, and then the end of the one here. */
  async #replace(decision: Decision, managed: Managed, deviceId: Uuid): Promise<{ moved: boolean }> {
    const { fleet, credentials, vms } = this.#options;
    const { vm } = decision;
    const target = fleet.directory.get(decision.target!.id);
    const body = freshVmFor(managed.record, this.devices.find(deviceId), credentials);
    if (!target || !body) return { moved: false };
    try {
      const vmId = await askForFresh(fleet, target.id, body);
      const vmAt = { cloudletId: target.id, name: target.name, url: target.url };
      const device = this.devices.put({ ...this.devices.find(deviceId), vmId, vmAt });
      this.#tellDevice('device.vm-moved', device, vm.id, target);
      vms().delete(vm.id, { force: true });
      const message = `A fresh VM '${vm.name}' serves at ${target.name}; the one here ends`;
      this.#keep({ ...decision, acted: true, result: { moved: true, message } });
    } catch (error) {
      this.#keep({ ...decision, acted: true, result: { moved: false, message: asAppError(error).message } });
    }
    return { moved: true };
  }

  #keep(decision: Decision): void {
    const { store, events } = this.#options;
    const { id, vm, device, outcome, target, acted, result, reasons } = decision;
    store.transact(() => {
      const isNew = store.decisions.get(id) === undefined;
      store.decisions.put(decision);
      const kind = isNew ? 'decision.made' : result ? 'decision.done' : 'decision.acted';
      events.append({
        kind,
        vmId: vm.id,
        data: {
          decisionId: id,
          ...(device ? { deviceId: device.id } : {}),
          outcome,
          ...(target ? { target } : {}),
          acted,
          ...(result ? { result } : { reason: reasons.at(-1) }),
        },
      });
    });
  }

  #ended(decision: Decision, failure: string | undefined): void {
    const { store } = this.#options;
    if (this.#closed) return;
    const { totalMs, downtimeMs } = store.migrations.get(decision.migrationId ?? '')?.result ?? {};
    this.#keep({
      ...decision,
      result: {
        moved: failure === undefined,
        message: failure ?? `VM '${decision.vm.name}' is now at ${decision.target?.name}`,
        ...(totalMs === undefined ? {} : { totalMs }),
        ...(downtimeMs === undefined ? {} : { downtimeMs }),
      },
    });
  }

  // --- as the companion of migrations

  async beforeStart(start: MigrationStart): Promise<void> {
    const { vm, peer, options, hasImage, id } = start;
    await this.devices.handOver(vm.id, peer);
    const neighbour = this.neighbours.get(peer.id);
    const dirtyBps = this.#dirty.get(vm.id)?.bps ?? 0;
    const rttMs = Math.round(neighbour?.rtt.smoothedMs ?? 0);
    const linkBps = neighbour?.bandwidthBps;
    const model = forecast({ vm, options, dirtyBps, linkBps, rttMs, sendsImage: !hasImage });
    this.profiles.started(id, queryOf(model, start));
    const device = this.devices.ofVm(vm.id);
    const rtt = device && this.#watches.get(device.id)?.rtt;
    if (rtt && rtt.samples > 0) this.#before.set(id, rtt.smoothedMs);
    if (device) this.#tellDevice('device.vm-moving', device, vm.id, peer);
  }

  afterEnd(record: MigrationRecord): void {
    if (record.role !== 'source') return;
    const { id, vm, peer, result, options, state } = record;
    this.profiles.ended(record);
    const moved = state.name === 'moved';
    // A VM that goes condensed sends little for its time; what the link has carried says more.
    const rateBps = options.engine === 'condensed' ? result?.link?.rateBps : result?.rateBps;
    if (moved && rateBps) this.neighbours.transferred(peer.id, rateBps, options.limits.bandwidthBps);
    const device = this.devices.ofVm(vm.id);
    const before = this.#before.get(id);
    this.#before.delete(id);
    const during = device && this.#watches.get(device.id)?.rtt;
    if (before !== undefined && during) this.profiles.learnDeltaRtt(peer.id, during.smoothedMs - before);
    const at = this.#options.fleet.directory.get(peer.id);
    if (device && at) this.#tellDevice(moved ? 'device.vm-moved' : 'device.vm-stayed', device, vm.id, at);
  }

  correct(model: Forecast, start: Omit<MigrationStart, 'id'>): Forecast {
    return this.profiles.correct(model, start);
  }

  #tellDevice(
    kind: string,
    { id: deviceId }: DeviceRecord,
    vmId: Uuid,
    peer: { id: Uuid; name: string; url: string },
  ): void {
    const data = { deviceId, cloudlet: { id: peer.id, name: peer.name, url: peer.url } };
    this.#options.events.append({ kind, vmId, data });
  }

  /** A cloudlet that has seen few migrations learns from those of its neighbours. */
  async #learnFromPeers(): Promise<void> {
    const { fleet, log } = this.#options;
    for (const peer of fleet.peers().slice(0, 10)) {
      if (this.#closed || !this.profiles.isYoung) return;
      try {
        const learned = this.profiles.learnFrom(await fleet.client.fetch(peer, '/v1/profile'));
        if (learned > 0) log.info({ peer: peer.name, learned }, 'learned from the migrations of a peer');
      } catch {
        // The next one may answer.
      }
    }
  }

  // --- life of the daemon

  async close(): Promise<void> {
    this.#closed = true;
    clearInterval(this.#timer);
    this.load[Symbol.dispose]();
    this.#vpn.close();
    for (const id of [...this.#watches.keys()]) this.#unwatch(id);
    await this.neighbours.close();
    await this.echo.close();
  }
}

const rounded = (value: number): number => Math.round(value * 100) / 100;
