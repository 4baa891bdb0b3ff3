/**
 * The source's part in a change of network: before the migration everything is made ready, so that nothing of it is
 * left for the switchover; afterwards what is not needed any more goes, or, when the VM stayed, all of it is undone.
 */
import { AppError, asAppError } from '../../model/errors.ts';
import type { Uuid } from '../../model/ids.ts';
import type { Attachment, Continuity, Place } from '../../model/vm.ts';
import {
  type Handoff,
  type HandoffStep,
  keepsAddress,
  newVni,
  planAwayEndRemoval,
  planSource,
} from '../../network/index.ts';
import type { Managed } from '../vms/registry.ts';
import { notTurned, perform, performAnyway, turnFrames } from './effects.ts';
import type { HandoffParts } from './parts.ts';
import type { HandoffRecord } from './record.ts';

export interface Leaving {
  /** Of the migration. */
  id: Uuid;
  managed: Managed;
  peer: { id: Uuid; name: string };
  /** What the caller wants; else what the VM is for. */
  wanted?: Continuity;
  /** The address of the VM's device in the network of the destination, if known. */
  device?: string;
  signal: AbortSignal;
}

/** What a VM does unless it is told otherwise: with two interfaces it can change its address. */
export const defaultContinuity = ({ waiting }: Attachment): Continuity =>
  waiting === undefined ? 'stretch' : 'mptcp';

export class SourceNetworks {
  readonly #parts: HandoffParts;

  constructor(parts: HandoffParts) {
    this.#parts = parts;
  }

  /**
   * Makes everything ready for the VM to leave; gives how its connections will go on, nothing for a VM without an
   * address of this cloudlet's. If the connections cannot all change to the next address (no agent, no free address, a
   * device that is away), the address stays and its LAN is stretched, which an event tells. Errors: whatever is in the
   * way of that, and nothing of it is left then.
   */
  async prepare(leaving: Leaving): Promise<Continuity | undefined> {
    const { id, managed, wanted, signal } = leaving;
    const { record } = managed;
    if (!record.attachment) return undefined;
    await this.#parts.settled(record.id);
    const choice = wanted ?? managed.record.continuity ?? defaultContinuity(record.attachment);
    try {
      await this.#begin(leaving, record.attachment, choice);
      this.#tell('vm.continuity', leaving, { continuity: choice });
      return choice;
    } catch (error) {
      // A daemon that stops undoes it when it is back.
      if (signal.aborted && asAppError(signal.reason).code !== 'cancelled') throw error;
      await this.#undo(id, managed);
      if (choice !== 'mptcp' || signal.aborted) throw error;
      const { code, message } = asAppError(error);
      this.#parts.log.warn({ err: error, migrationId: id, vmId: record.id }, 'the LAN is stretched instead');
      this.#tell('vm.continuity', leaving, {
        continuity: 'stretch',
        insteadOf: choice,
        code,
        reason: message,
      });
    }
    try {
      await this.#begin(leaving, record.attachment, 'stretch');
      return 'stretch';
    } catch (error) {
      await this.#undo(id, managed);
      throw error;
    }
  }

  /** The VM stands still. A turn that fails costs the tries of its peers, and nothing else. */
  async turn(id: Uuid): Promise<void> {
    const { store, tellTurn } = this.#parts;
    const record = store.handoffs.get(id);
    if (record?.role !== 'source' || record.handoff.continuity === 'none') return;
    const { peer, handoff } = record;
    const isRouted = handoff.continuity === 'host-route';
    const homes =
      isRouted && record.home && record.home.cloudletId !== peer.id ? [record.home.cloudletId] : [];
    await Promise.all([
      ...[peer.id, ...homes].map((each) =>
        tellTurn(each, id).catch((error) => this.#parts.log.warn({ err: error, migrationId: id }, notTurned)),
      ),
      turnFrames(this.#parts, id, planSource(handoff).turn),
    ]);
  }

  /** The VM runs here again after it had stood still. */
  async turnBack(id: Uuid): Promise<void> {
    const record = this.#parts.store.handoffs.get(id);
    if (record?.role !== 'source') return;
    await turnFrames(this.#parts, id, planSource(record.handoff).turnBack);
  }

  /** The VM has left: what it needed here goes; a LAN that is stretched to it stays. */
  async moved(id: Uuid): Promise<void> {
    const { store, leases } = this.#parts;
    const record = store.handoffs.get(id);
    if (record?.role !== 'source') return;
    const { handoff, vmId } = record;
    await this.#anyway(record, planSource(handoff).after, undefined);
    await this.#leaveAway(record);
    if (keepsAddress(handoff.continuity) && handoff.tunnel && !record.home)
      return store.handoffs.put({ ...record, role: 'home' });
    if (!record.home || !keepsAddress(handoff.continuity)) leases.releaseAll(vmId);
    store.handoffs.delete(id);
  }

  /** The VM stays: all is as it was before. */
  async stayed(id: Uuid, managed: Managed | undefined): Promise<void> {
    await this.#undo(id, managed);
  }

  async #begin(leaving: Leaving, attachment: Attachment, continuity: Continuity): Promise<void> {
    const { store, ask, run } = this.#parts;
    const { id, managed, peer, signal, device } = leaving;
    const handoff = await this.#handoffOf(leaving, attachment, continuity);
    const { home } = attachment;
    const { spec, id: vmId } = managed.record;
    const first: HandoffRecord = { id, vmId, role: 'source', peer, handoff, ...(home ? { home } : {}) };
    store.handoffs.put(first);
    const question = {
      vmId,
      continuity,
      network: spec.nets[handoff.serving]!.network,
      attachment,
      macs: spec.nets.map(({ mac }) => mac),
      ...(handoff.gatewayMac === undefined ? {} : { gatewayMac: handoff.gatewayMac }),
      ...(device === undefined ? {} : { device }),
    };
    const own = this.#parts.self();
    const isHomecoming = keepsAddress(continuity) && home?.cloudletId === peer.id;
    const wantsTunnel = continuity !== 'none' && !isHomecoming;
    // The tunnel leads from the destination to the LAN that is stretched: in pre-join its own, else that of the home.
    const other = keepsAddress(continuity) && home ? home : { cloudletId: own.id, name: own.name };
    const vni = newVni();
    const otherAddress =
      wantsTunnel && other.cloudletId !== own.id
        ? (await ask(other.cloudletId, id, { ...question, role: 'home', tunnel: undefined }, signal))
            .tunnelAddress
        : own.tunnelAddress;
    if (wantsTunnel && otherAddress === undefined)
      throw new AppError('unsupported', `${other.name} has no tunnelAddress, so no tunnel can lead there`, {
        missing: 'tunnelAddress',
      });
    const tunnel = wantsTunnel ? { tunnel: { vni, address: otherAddress!, ...other } } : {};
    const answer = await ask(peer.id, id, { ...question, ...tunnel, role: 'destination' }, signal);
    if (wantsTunnel && other.cloudletId !== own.id) {
      const far = { vni, address: answer.tunnelAddress!, cloudletId: peer.id, name: peer.name };
      await ask(other.cloudletId, id, { ...question, role: 'home', tunnel: far }, signal);
    }
    const isRoutedHere = continuity === 'host-route' && wantsTunnel && other.cloudletId === own.id;
    const full: Handoff = {
      ...handoff,
      ...(isRoutedHere ? { hop: await this.#parts.hopTo(answer.tunnelAddress!) } : {}),
      ...(answer.place ? { next: this.#nextPlace(handoff, spec.nets, answer.place) } : {}),
      ...(wantsTunnel && other.cloudletId === own.id
        ? { tunnel: { vni, local: own.tunnelAddress!, remote: answer.tunnelAddress! } }
        : {}),
    };
    const record = { ...first, handoff: full };
    store.handoffs.put(record);
    await this.#parts.guard();
    for (const [index, { run: action }] of planSource(full).before.entries()) {
      store.handoffs.put({ ...record, begun: index + 1 });
      try {
        await perform(action, { run, machine: managed.machine, signal });
      } catch (error) {
        // What a guest has not heard need not be undone, and it would not hear that either.
        if (error instanceof AppError && error.code === 'agent_unavailable')
          store.handoffs.put({ ...record, begun: index });
        throw error;
      }
    }
  }

  async #handoffOf(leaving: Leaving, attachment: Attachment, continuity: Continuity): Promise<Handoff> {
    const { self, bridgeOf, gatewayMacOf, store } = this.#parts;
    const { spec, id: vmId } = leaving.managed.record;
    const { serving, waiting, place } = attachment;
    const { network, mac } = spec.nets[serving]!;
    const away = this.#away(vmId, store.handoffs.all());
    const bridge = bridgeOf(network);
    const gatewayMac = away ? away.handoff.gatewayMac : await gatewayMacOf(bridge, place.gateway);
    if (continuity === 'host-route' && gatewayMac === undefined)
      throw new AppError(
        'unsupported',
        `The gateway of ${network} is not this cloudlet, so no route to the VM alone can be set`,
        { missing: `gateway of network ${network}` },
      );
    if (!keepsAddress(continuity) && waiting === undefined)
      throw new AppError(
        'unsupported',
        `The VM has one interface, but '${continuity}' wants one that waits`,
        {
          missing: 'second interface',
        },
      );
    return {
      owner: self().id,
      vmId,
      continuity,
      bridge,
      serving,
      ...(waiting === undefined ? {} : { waiting }),
      last: { ...place, mac },
      ...(gatewayMac === undefined ? {} : { gatewayMac }),
      ...(away ? { isAway: true as const } : {}),
    };
  }

  #nextPlace({ waiting = 0 }: Handoff, nets: { mac: string }[], place: Place) {
    return { ...place, mac: nets[waiting]!.mac };
  }

  async #undo(id: Uuid, managed: Managed | undefined): Promise<void> {
    const { store, giveBack, log } = this.#parts;
    const record = store.handoffs.get(id);
    if (record?.role !== 'source') return;
    const before = planSource(record.handoff).before.slice(0, record.begun ?? 0);
    await this.#anyway(record, planSource(record.handoff).turnBack, undefined);
    const undoes = before.toReversed().flatMap(({ undo }: HandoffStep) => (undo ? [undo] : []));
    await this.#anyway(record, undoes, managed);
    const others = new Set([record.peer.id, ...(record.home ? [record.home.cloudletId] : [])]);
    // It gives it up by itself, later, if this is not heard.
    for (const other of others)
      await giveBack(other, id).catch((error) =>
        log.warn({ err: error, migrationId: id, vmId: record.vmId }, 'a reservation was not given back'),
      );
    store.handoffs.delete(id);
  }

  /** The VM was away from home here: its bridge and tunnel go, at home, too. */
  async #leaveAway({ vmId, peer }: HandoffRecord): Promise<void> {
    const { store, giveBack, log } = this.#parts;
    const away = this.#away(vmId, store.handoffs.all());
    if (!away) return;
    const commands = planAwayEndRemoval(away.handoff);
    await this.#anyway(away, [{ kind: 'host', commands }], undefined);
    // A home that takes the VM in does so by itself.
    if (away.home && away.home.cloudletId !== peer.id)
      await giveBack(away.home.cloudletId, away.id).catch((error) =>
        log.warn({ err: error, vmId }, 'the home of the VM was not told that it has left'),
      );
    store.handoffs.delete(away.id);
  }

  /** A VM that was away, or at home, is deleted. */
  async forget(vmId: Uuid): Promise<void> {
    const { store, leases } = this.#parts;
    leases.releaseAll(vmId);
    const away = this.#away(vmId, store.handoffs.all());
    if (away) await this.#leaveAway({ ...away, peer: { id: '', name: '' } });
  }

  #away(vmId: Uuid, records: HandoffRecord[]): HandoffRecord | undefined {
    return records.find((record) => record.vmId === vmId && record.role === 'away');
  }

  async #anyway(
    record: HandoffRecord,
    actions: Parameters<typeof perform>[0][],
    managed: Managed | undefined,
  ) {
    const { run, log } = this.#parts;
    for (const action of actions)
      for (const error of await performAnyway(action, { run, machine: managed?.machine }))
        log.warn(
          { err: error, migrationId: record.id, vmId: record.vmId },
          'a step of a handoff was not undone',
        );
  }

  #tell(kind: string, { id, managed, peer }: Leaving, data: Record<string, string>): void {
    const { id: vmId, name } = managed.record;
    this.#parts.events.append({ kind, vmId, data: { migrationId: id, name, peer: peer.name, ...data } });
  }
}
