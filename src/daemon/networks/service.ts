/**
 * The networks of this cloudlet's VMs: the addresses that it gives out, and what it does around migrations so that the
 * connections of a VM's clients go on. What it has done is in the store before it is done, so that a daemon that starts
 * again finds it.
 */
import { isIPv4 } from 'node:net';
import type { FastifyBaseLogger } from 'fastify';
import type { CloudletIdentity } from '../../fleet/index.ts';
import { AppError } from '../../model/errors.ts';
import type { Uuid } from '../../model/ids.ts';
import type { Attachment, VmSpec } from '../../model/vm.ts';
import {
  type CloudletNetwork,
  findNetwork,
  type Hop,
  hopCommand,
  type Link,
  listLinksCommand,
  ownTunnelDevices,
  parseHop,
  parseLinks,
  planDestination,
  planHomeEnd,
  planHomeTurn,
  type Run,
} from '../../network/index.ts';
import type { Config } from '../config.ts';
import type { Principal } from '../credentials.ts';
import type { EventLog } from '../events.ts';
import type { Fleet } from '../fleet.ts';
import type { Store } from '../store/index.ts';
import type { VmRegistry } from '../vms/registry.ts';
import { DestinationNetworks } from './destination.ts';
import { perform } from './effects.ts';
import { Guard } from './guard.ts';
import { Leases } from './leases.ts';
import type { HandoffParts, PreparedNetwork, PrepareNetwork } from './parts.ts';
import type { HandoffRecord } from './record.ts';
import { SourceNetworks } from './source.ts';

export interface NetworksOptions {
  identity: () => CloudletIdentity;
  config: Config;
  store: Store;
  events: EventLog;
  registry: VmRegistry;
  fleet: () => Fleet;
  log: FastifyBaseLogger;
  run: Run;
}

/** The peer may make bridges and tunnels, which is some processes. */
const askTimeoutMs = 30_000;
/** The VM stands still for no longer than that. */
const turnTimeoutMs = 3000;
const sweepEveryMs = 30_000;

export class Networks {
  readonly leases: Leases;
  readonly source: SourceNetworks;
  readonly destination: DestinationNetworks;
  readonly guard: Guard;
  readonly #options: NetworksOptions;
  #sweeping: NodeJS.Timeout | undefined;

  constructor(options: NetworksOptions) {
    this.#options = options;
    const { store, events, log, run, config } = options;
    this.leases = new Leases({ store, networks: config.networks });
    this.guard = new Guard({
      owner: options.identity().id,
      networks: config.networks,
      run,
      vms: () => options.registry.all().map(({ record }) => record),
      handoffs: () => store.handoffs.all(),
    });
    const parts: HandoffParts = {
      guard: () => this.guard.update(),
      store,
      leases: this.leases,
      events,
      log,
      run,
      self: () => this.#self(),
      bridgeOf: (network) => bridgeOf(config.networks, network),
      networkOf: (bridge) =>
        config.networks.find((each) => each.kind === 'bridge' && each.bridge === bridge)?.name,
      gatewayMacOf: (bridge, gateway) => this.#gatewayMacOf(bridge, gateway),
      settled: (vmId) => this.destination.settled(vmId),
      hopTo: (address) => this.#hopTo(address),
      ask: (peerId, id, question, signal) => this.#ask(peerId, id, question, signal),
      giveBack: (peerId, id) => this.#giveBack(peerId, id),
      tellTurn: (peerId, id) => this.#tellTurn(peerId, id),
    };
    this.source = new SourceNetworks(parts);
    this.destination = new DestinationNetworks(parts);
  }

  /**
   * A spec whose first interface in a network with addresses has one, as its guest finds it at its first boot; a second
   * one in the same network waits. What the caller has set is left as it is. Errors: `no_free_address`.
   */
  attach(vmId: Uuid, spec: VmSpec): { spec: VmSpec; attachment?: Attachment } {
    const serving = spec.nets.findIndex(({ network }) => this.leases.gives(network));
    const net = spec.nets[serving];
    if (!net || spec.seed.addresses.some(({ mac }) => mac === net.mac)) return { spec };
    const place = this.leases.reserve({ network: net.network, vmId });
    const waiting = spec.nets.findIndex(({ network }, index) => index > serving && network === net.network);
    const pair = waiting < 0 ? { serving } : { serving, waiting };
    const { address, gateway } = place;
    const seed = {
      ...spec.seed,
      addresses: [...spec.seed.addresses, { mac: net.mac, address, gateway }],
      ...(waiting < 0 ? {} : { waiting: [spec.nets[waiting]!.mac] }),
    };
    return { spec: { ...spec, seed }, attachment: { ...pair, place } };
  }

  /** Asked by a peer. Errors: `unsupported`, `no_free_address`, `forbidden` for a migration of others. */
  prepare(id: Uuid, question: PrepareNetwork, caller: Principal): Promise<PreparedNetwork> {
    const peer = this.#require(id, caller);
    return this.destination.prepare(id, question, peer);
  }

  /** Asked by a peer. Errors: `forbidden`. */
  async giveBack(id: Uuid, caller: Principal): Promise<void> {
    this.#require(id, caller);
    const record = this.#options.store.handoffs.get(id);
    // One whose VM has begun to come is over when its migration is.
    if (record?.role === 'destination' && record.expiresAt === undefined) return;
    await this.destination.drop(id);
  }

  /** Told by a peer. Errors: `forbidden`. */
  async turn(id: Uuid, caller: Principal): Promise<void> {
    this.#require(id, caller);
    await this.destination.turn(id);
  }

  #require(id: Uuid, caller: Principal): { id: Uuid; name: string } {
    if (caller.kind !== 'cloudlet')
      throw new AppError('forbidden', 'Only cloudlets ask this', { wanted: 'peer' });
    const known = this.#options.store.handoffs.get(id);
    if (known && known.peer.id !== caller.cloudletId && known.askedBy !== caller.cloudletId)
      throw new AppError('forbidden', `Cloudlet ${caller.name} has no part in migration ${id}`, {
        wanted: 'peer',
      });
    return { id: caller.cloudletId, name: caller.name };
  }

  /**
   * After a start of the daemon, when migrations go on: what belongs to none of them is ended, LANs that are stretched are
   * stretched again (the host may have been away, too), and what nobody knows is removed.
   */
  async recover(isOpen: (migrationId: Uuid) => boolean): Promise<void> {
    const { store, registry, log, run } = this.#options;
    const failed = (record: HandoffRecord) => (error: unknown) =>
      log.error({ err: error, migrationId: record.id, vmId: record.vmId }, 'a handoff could not be ended');
    for (const record of store.handoffs.all()) {
      const managed = registry.all().find((each) => each.record.id === record.vmId);
      if (record.role === 'home' || record.role === 'away') await this.#remake(record).catch(failed(record));
      else if (isOpen(record.id)) continue;
      else if (record.role === 'source') {
        if (managed) await this.source.stayed(record.id, managed).catch(failed(record));
        else await this.source.moved(record.id).catch(failed(record));
      } else if (record.expiresAt === undefined) {
        if (managed) await this.destination.arrived(record.id, managed).catch(failed(record));
        else await this.destination.drop(record.id).catch(failed(record));
      }
    }
    const kept = new Set(store.handoffs.all().map(({ vmId }) => vmId));
    const links = await this.#links().catch(() => []);
    for (const { link, vmId } of ownTunnelDevices(links, this.#self().id))
      if (!kept.has(vmId))
        await run('ip', ['link', 'delete', 'dev', link.name], { signal: AbortSignal.timeout(askTimeoutMs) });
    if (registry.all().length > 0) await this.guard.update();
    this.#sweeping = setInterval(() => {
      this.destination.expire().catch((error) => log.error({ err: error }, 'giving up reservations failed'));
    }, sweepEveryMs).unref();
  }

  async #remake(record: HandoffRecord): Promise<void> {
    const { handoff, role } = record;
    const { tunnel } = handoff;
    if (!tunnel) return;
    const links = await this.#links();
    const present = ownTunnelDevices(links, handoff.owner).filter(({ vmId }) => vmId === record.vmId);
    const isRouted = handoff.continuity === 'host-route';
    const kind = !isRouted ? 'vxlan' : role === 'home' ? 'macvlan' : 'bridge';
    if (present.some(({ link }) => link.kind === kind)) return;
    const { before, turn } = planDestination(handoff);
    const [steps, turns] = role === 'home' ? [[planHomeEnd(handoff)], planHomeTurn(handoff)] : [before, turn];
    const actions = [...steps.map((step) => step.run), ...(isRouted ? turns : [])];
    const signal = AbortSignal.timeout(askTimeoutMs);
    for (const action of actions)
      await perform(action, { run: this.#options.run, machine: undefined, signal });
  }

  close(): void {
    clearInterval(this.#sweeping);
  }

  #self(): { id: Uuid; name: string; tunnelAddress?: string } {
    const { id, name, url } = this.#options.identity();
    const { hostname } = new URL(url);
    const fromUrl = isIPv4(hostname) && !hostname.startsWith('127.') ? hostname : undefined;
    const tunnelAddress = this.#options.config.tunnelAddress ?? fromUrl;
    return { id, name, ...(tunnelAddress === undefined ? {} : { tunnelAddress }) };
  }

  async #links(): Promise<Link[]> {
    const [program, ...args] = listLinksCommand;
    return parseLinks(
      (await this.#options.run(program, args, { signal: AbortSignal.timeout(askTimeoutMs) })).stdout,
    );
  }

  async #gatewayMacOf(bridge: string, gateway: string): Promise<string | undefined> {
    const args = ['-j', '-4', 'address', 'show', 'dev', bridge, 'to', `${gateway}/32`];
    const { stdout } = await this.#options.run('ip', args, { signal: AbortSignal.timeout(askTimeoutMs) });
    const isGateway = stdout.includes(`"local":"${gateway}"`);
    return isGateway ? (await this.#links()).find(({ name }) => name === bridge)?.mac : undefined;
  }

  async #hopTo(address: string): Promise<Hop> {
    const [program, ...args] = hopCommand(address);
    const { stdout } = await this.#options.run(program, args, { signal: AbortSignal.timeout(askTimeoutMs) });
    const hop = parseHop(stdout);
    if (hop) return hop;
    throw new AppError('unsupported', `No route of this host leads to ${address}`, { missing: 'route' });
  }

  async #ask(
    peerId: Uuid,
    id: Uuid,
    question: Parameters<HandoffParts['ask']>[2],
    signal: AbortSignal,
  ): Promise<PreparedNetwork> {
    const json = question;
    const answer = await this.#options
      .fleet()
      .client.fetch(this.#peer(peerId), `/v1/migrations/${id}/network`, {
        method: 'PUT',
        json,
        signal,
        timeoutMs: askTimeoutMs,
      });
    return (answer ?? {}) as PreparedNetwork;
  }

  async #giveBack(peerId: Uuid, id: Uuid): Promise<void> {
    await this.#options.fleet().client.fetch(this.#peer(peerId), `/v1/migrations/${id}/network`, {
      method: 'DELETE',
      timeoutMs: askTimeoutMs,
    });
  }

  async #tellTurn(peerId: Uuid, id: Uuid): Promise<void> {
    await this.#options.fleet().client.fetch(this.#peer(peerId), `/v1/migrations/${id}/network/turn`, {
      method: 'POST',
      timeoutMs: turnTimeoutMs,
    });
  }

  #peer(id: Uuid): { id: Uuid; url: string } {
    const found = this.#options
      .fleet()
      .peers()
      .find((peer) => peer.id === id);
    if (found) return found;
    throw new AppError('not_found', `There is no peer '${id}'`, { kind: 'peer', name: id });
  }
}

function bridgeOf(networks: readonly CloudletNetwork[], name: string): string {
  const network = findNetwork(networks, name);
  if (network.kind === 'bridge') return network.bridge;
  throw new AppError(
    'unsupported',
    `Network ${name} is no bridge, so no VM can bring its connections there`,
    {
      missing: `bridge of network ${name}`,
    },
  );
}
