/**
 * The destination's part in a change of network, and that of a VM's home whose LAN is stretched: address and tunnel are
 * there before the VM comes, and given up by themselves if it never does.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { AppError } from '../../model/errors.ts';
import type { Uuid } from '../../model/ids.ts';
import type { Attachment, Place, VmSpec } from '../../model/vm.ts';
import {
  type Action,
  bridgeFor,
  type Handoff,
  keepsAddress,
  planDestination,
  planHomeEnd,
  planHomeTurn,
} from '../../network/index.ts';
import type { Managed } from '../vms/registry.ts';
import { perform, performAnyway, turnFrames } from './effects.ts';
import type { HandoffParts, PreparedNetwork, PrepareNetwork } from './parts.ts';
import type { HandoffRecord } from './record.ts';

/** How long the source may take to come: it asks its guest, and sends an image first. */
const reservationMs = 300_000;
/** For the guest at the source to take its connections back to where they were, when its VM does not come after all. */
const withdrawnMs = 120_000;
/** A guest that begins to run here has clients that wait for it: what is not urgent comes a moment later. */
const settleMs = 1000;

export class DestinationNetworks {
  readonly #parts: HandoffParts;
  /** By VM: those that have arrived and are being put in order. */
  readonly #settling = new Map<Uuid, Promise<void>>();

  constructor(parts: HandoffParts) {
    this.#parts = parts;
  }

  /** Resolves when nothing of the VM's arrival is left to do. */
  async settled(vmId: Uuid): Promise<void> {
    await this.#settling.get(vmId)?.catch(() => {});
  }

  /** Reserves the address and makes this end of the tunnel. Errors: `unsupported`, `no_free_address`. */
  async prepare(
    id: Uuid,
    question: PrepareNetwork,
    peer: { id: Uuid; name: string },
  ): Promise<PreparedNetwork> {
    const { self, store, bridgeOf } = this.#parts;
    if (question.role === 'home') this.#requireHolder(question.vmId, peer);
    const { tunnelAddress } = self();
    const place = question.role === 'destination' ? this.#reserve(question) : undefined;
    const handoff = this.#handoffOf(question, place, bridgeOf(question.network));
    const answer = { ...(place ? { place } : {}), ...(tunnelAddress ? { tunnelAddress } : {}) };
    if (question.role === 'home') return this.#prepareHome(id, question, handoff, answer, peer.id);
    const { attachment } = question;
    const { tunnel } = question;
    // The VM comes home when no tunnel is wanted: then nothing is stretched any more.
    const home = tunnel && { cloudletId: tunnel.cloudletId, name: tunnel.name };
    const record: HandoffRecord = {
      id,
      vmId: question.vmId,
      role: 'destination',
      peer,
      handoff,
      place: place ?? attachment.place,
      ...(keepsAddress(question.continuity) && home ? { home } : {}),
      expiresAt: this.#deadline(),
    };
    store.handoffs.put(record);
    try {
      await this.#parts.guard();
      for (const { run } of planDestination(handoff).before) await this.#perform(run);
    } catch (error) {
      await this.drop(id);
      throw error;
    }
    return answer;
  }

  /** A tunnel into this LAN is for the cloudlet at which one of its VMs is, and for nobody else. */
  #requireHolder(vmId: Uuid, peer: { id: Uuid; name: string }): void {
    const isHolder = (record: HandoffRecord) =>
      record.vmId === vmId && record.role === 'home' && record.peer.id === peer.id;
    if (this.#parts.store.handoffs.all().some(isHolder)) return;
    throw new AppError('forbidden', `VM ${vmId} is no VM of this cloudlet that is away at ${peer.name}`, {
      wanted: 'the cloudlet at which the VM is',
    });
  }

  /** Twice: for its address, then with the other end of the tunnel. */
  async #prepareHome(
    id: Uuid,
    { vmId, tunnel }: PrepareNetwork,
    handoff: Handoff,
    answer: PreparedNetwork,
    askedBy: Uuid,
  ): Promise<PreparedNetwork> {
    if (!tunnel) return answer;
    const { store, guard, hopTo } = this.#parts;
    const peer = { id: tunnel.cloudletId, name: tunnel.name };
    const isRouted = handoff.continuity === 'host-route';
    const full = isRouted ? { ...handoff, hop: await hopTo(tunnel.address) } : handoff;
    const hasStandIn =
      isRouted && this.#homesOf(vmId).some((each) => each.handoff.continuity === 'host-route');
    store.handoffs.put({ id, vmId, role: 'home', peer, askedBy, handoff: full });
    await guard();
    if (!hasStandIn) await this.#perform(planHomeEnd(full).run);
    return answer;
  }

  /** The VM stands still at the source: its frames wait here, or are sent on to where it will run. */
  async turn(id: Uuid): Promise<void> {
    const record = this.#parts.store.handoffs.get(id);
    if (record?.role === 'home') return turnFrames(this.#parts, id, planHomeTurn(record.handoff));
    if (record?.role !== 'destination') return;
    await turnFrames(this.#parts, id, planDestination(record.handoff).turn);
  }

  #homesOf(vmId: Uuid): HandoffRecord[] {
    return this.#parts.store.handoffs.all().filter((each) => each.vmId === vmId && each.role === 'home');
  }

  /**
   * The VM does not come. Its connections may be on the address that waits for it here, and go back over the tunnel:
   * that is given up when the source says so, or by itself.
   */
  async withdraw(id: Uuid): Promise<void> {
    const { store } = this.#parts;
    const record = store.handoffs.get(id);
    const hasConnections = record?.handoff.continuity === 'mptcp' && record.handoff.tunnel !== undefined;
    if (record?.role !== 'destination' || !hasConnections) return this.drop(id);
    store.handoffs.put({ ...record, expiresAt: new Date(Date.now() + withdrawnMs).toISOString() });
  }

  /** Gives up what was prepared, for one that may; nothing there is no error. */
  async drop(id: Uuid): Promise<void> {
    const { store, leases } = this.#parts;
    const record = store.handoffs.get(id);
    if (!record || record.role === 'source' || record.role === 'away') return;
    const { handoff, vmId } = record;
    const others = this.#homesOf(vmId).filter((each) => each.id !== id);
    const isRouted = ({ handoff: { continuity } }: HandoffRecord) => continuity === 'host-route';
    // The stand-in of a VM is one, wherever it is.
    const goesOn = record.role === 'home' && isRouted(record) && others.some(isRouted);
    if (!goesOn) await this.#anyway(record, undoOf(record), undefined);
    if (record.role === 'destination' && handoff.next) {
      const network = this.#networkOf(handoff.bridge);
      const { address } = handoff.next;
      const isWanted = store.handoffs
        .all()
        .some((each) => each.id !== id && each.vmId === vmId && each.handoff.next?.address === address);
      // It may have set out again meanwhile.
      if (network && !isWanted) leases.release(network, vmId, handoff.next);
    }
    store.handoffs.delete(id);
    // A VM that goes on from there to another cloudlet, or does not come home after all, is still away.
    const away = others.at(-1);
    if (away && (record.role === 'home' || isRouted(away)))
      for (const action of planHomeTurn(away.handoff)) await this.#perform(action);
    else if (record.role === 'home') leases.releaseAll(vmId);
  }

  /** The VM begins to come: what is reserved for it stays until its migration ends. */
  taken(id: Uuid): void {
    const { store, leases } = this.#parts;
    const record = store.handoffs.get(id);
    if (record?.role !== 'destination') return;
    const { expiresAt: _expiresAt, ...kept } = record;
    store.handoffs.put(kept);
    const network = this.#networkOf(record.handoff.bridge);
    if (record.handoff.next && network) leases.keep(network, record.vmId, record.handoff.next);
  }

  /** What the VM's record says at this cloudlet: where it is at home, and what its guest finds when it boots. */
  settle(id: Uuid, spec: VmSpec): { spec: VmSpec; attachment?: Attachment } {
    const record = this.#parts.store.handoffs.get(id);
    if (record?.role !== 'destination') return { spec };
    const { handoff, home } = record;
    const { serving, waiting, next } = handoff;
    const pair = { serving, ...(waiting === undefined ? {} : { waiting }) };
    if (!next || waiting === undefined) {
      const { mac: _mac, ...place } = handoff.last;
      return { spec, attachment: { ...pair, place, ...(home ? { home } : {}) } };
    }
    const { mac, ...place } = next;
    const { last } = handoff;
    const others = spec.seed.addresses.filter((each) => each.mac !== last.mac && each.mac !== mac);
    const seed = {
      ...spec.seed,
      addresses: [...others, { mac, address: place.address, gateway: place.gateway }],
      waiting: [last.mac],
    };
    return { spec: { ...spec, seed }, attachment: { serving: waiting, waiting: serving, place } };
  }

  /** The VM runs here; `justNow`: and has clients that have waited for it. */
  arrived(id: Uuid, managed: Managed, { justNow = false } = {}): Promise<void> {
    const vmId = managed.record.id;
    const settled = this.#settle(id, managed, justNow ? settleMs : 0).finally(() => {
      if (this.#settling.get(vmId) === settled) this.#settling.delete(vmId);
    });
    this.#settling.set(vmId, settled);
    return settled;
  }

  async #settle(id: Uuid, managed: Managed, afterMs: number): Promise<void> {
    const { store, events } = this.#parts;
    if (afterMs > 0) await sleep(afterMs);
    const record = store.handoffs.get(id);
    if (record?.role !== 'destination') return;
    const { handoff, vmId, home } = record;
    const failures = await this.#anyway(record, planDestination(handoff).after, managed);
    // It is at home again: nothing leads away any more.
    for (const each of store.handoffs.all()) {
      if (each.vmId !== vmId || each.role !== 'home') continue;
      await this.#anyway(each, undoOf(each), undefined);
      store.handoffs.delete(each.id);
    }
    if (home) store.handoffs.put({ ...record, role: 'away' });
    else store.handoffs.delete(id);
    const { address } = handoff.next ?? handoff.last;
    const unfinished = failures.map(({ message }) => message).join('; ');
    const data = { migrationId: id, name: managed.record.name, address, continuity: handoff.continuity };
    events.append({ kind: 'vm.address', vmId, data: { ...data, ...(unfinished ? { unfinished } : {}) } });
  }

  /** The bridge that an interface of the VM joins here, if not that of its network. */
  bridgeFor(vmId: Uuid, index: number): string | undefined {
    for (const { role, handoff, ...record } of this.#parts.store.handoffs.all()) {
      if (record.vmId !== vmId || (role !== 'destination' && role !== 'away')) continue;
      const found = bridgeFor(handoff, index);
      if (found) return found;
    }
    return undefined;
  }

  /** Gives up what nobody came for. */
  async expire(now = new Date().toISOString()): Promise<void> {
    const { store } = this.#parts;
    for (const { id, expiresAt } of store.handoffs.all())
      if (expiresAt !== undefined && expiresAt <= now) await this.drop(id);
  }

  #reserve({ continuity, network, vmId, device }: PrepareNetwork): Place | undefined {
    if (keepsAddress(continuity)) return undefined;
    return this.#parts.leases.reserve({
      network,
      vmId,
      expiresAt: this.#deadline(),
      ...(device === undefined ? {} : { device }),
    });
  }

  #handoffOf(question: PrepareNetwork, place: Place | undefined, bridge: string): Handoff {
    const { vmId, continuity, attachment, macs, tunnel, gatewayMac } = question;
    const { serving, waiting } = attachment;
    const macOf = (index: number): string => {
      const mac = macs[index];
      if (mac) return mac;
      throw new AppError('invalid_request', `Prepare network: interface ${index} has no MAC`, {
        problems: [{ field: 'body.macs', value: macs, wanted: `one for interface ${index}` }],
      });
    };
    const { id, tunnelAddress } = this.#parts.self();
    if (tunnel && tunnelAddress === undefined)
      throw new AppError('unsupported', 'This cloudlet has no tunnelAddress in its configuration', {
        missing: 'tunnelAddress',
      });
    return {
      owner: id,
      vmId,
      continuity,
      bridge,
      serving,
      ...(waiting === undefined ? {} : { waiting }),
      last: { ...attachment.place, mac: macOf(serving) },
      ...(place && waiting !== undefined ? { next: { ...place, mac: macOf(waiting) } } : {}),
      ...(tunnel ? { tunnel: { vni: tunnel.vni, local: tunnelAddress!, remote: tunnel.address } } : {}),
      ...(gatewayMac === undefined ? {} : { gatewayMac }),
    };
  }

  #networkOf(bridge: string): string | undefined {
    return this.#parts.networkOf(bridge);
  }

  #deadline(): string {
    return new Date(Date.now() + reservationMs).toISOString();
  }

  async #perform(action: Action): Promise<void> {
    const { run } = this.#parts;
    await perform(action, { run, machine: undefined, signal: AbortSignal.timeout(30_000) });
  }

  async #anyway(record: HandoffRecord, actions: Action[], managed: Managed | undefined): Promise<Error[]> {
    const { run, log } = this.#parts;
    const failures: Error[] = [];
    for (const action of actions)
      failures.push(...(await performAnyway(action, { run, machine: managed?.machine })));
    for (const error of failures)
      log.warn({ err: error, migrationId: record.id, vmId: record.vmId }, 'a step of a handoff failed');
    return failures;
  }
}

function undoOf({ role, handoff }: HandoffRecord): Action[] {
  const steps =
    role === 'home' ? (handoff.tunnel ? [planHomeEnd(handoff)] : []) : planDestination(handoff).before;
  return steps.toReversed().flatMap(({ undo }) => (undo ? [undo] : []));
}
