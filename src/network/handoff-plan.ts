/**
 * What the two cloudlets do about a VM's address around a migration, as lists of steps: pure, so that both sides and
 * the tests see one plan. Each step says how it is undone; a migration that fails undoes them backwards.
 *
 *   mptcp     before: the waiting interface of the VM, still at the source, is joined by a tunnel to the LAN of the
 *             destination and takes its next address there; the guest announces it, all peers join it, the old address
 *             goes out of use. Then the VM moves, and nothing of the network is left for the switchover. After: the
 *             tunnel goes, and the interface that served waits.
 *   stretch   before: the destination has a bridge for the VM alone, joined by a tunnel to the LAN of the VM's home, with
 *             the gateway's address and MAC, and a route to the VM's address. They stay while the VM is there.
 *   none      before: the address is reserved. After: the guest takes it.
 *
 * As soon as the VM stands still, frames for it are turned to where it will run: they wait in the queue of its tap there
 * and are the first that it hears. Else they are lost, and TCP's next try is up to a second later.
 */
import type { Uuid } from '../model/ids.ts';
import type { Continuity } from '../model/vm.ts';
import type { Command } from './commands.ts';
import type { GuestPlace, GuestStep } from './guest-network.ts';
import { requireDeviceName } from './networks.ts';
import { tapName } from './tap-plan.ts';
import {
  isolationName,
  planIsolation,
  planTunnel,
  planTunnelRemoval,
  type Tunnel,
  tunnelMtu,
  tunnelName,
} from './tunnel-plan.ts';

export interface Handoff {
  /** The cloudlet that plans; what it makes carries it. */
  owner: Uuid;
  vmId: Uuid;
  continuity: Continuity;
  /** Of this cloudlet's LAN. */
  bridge: string;
  serving: number;
  waiting?: number;
  last: GuestPlace;
  /** Missing when the address stays. */
  next?: GuestPlace;
  /** As this cloudlet's end of it; missing when there is none. */
  tunnel?: Tunnel;
  /** Of the gateways of all LANs. Missing where each has its own. */
  gatewayMac?: string;
}

export type Action =
  | { kind: 'host'; commands: Command[] }
  /** In the guest, through its agent. */
  | { kind: 'guest'; step: GuestStep };

export interface HandoffStep {
  name: string;
  run: Action;
  /** Also after a `run` that failed half-way. */
  undo?: Action;
}

export interface HandoffPlan {
  /** In this order, before the VM moves. */
  before: HandoffStep[];
  /** When the VM stands still. Never undone: a bridge learns where a VM is from the first frame that it sends. */
  turn: Action[];
  /** When it has moved. What fails here is told, and does not take the VM back. */
  after: Action[];
}

/** Full frames; what a LAN carries. */
export const lanMtu = 1500;
/** For all peers to come to the next address: three tries of each, as a peer gives one up after about 3 s. */
export const joinWaitMs = 15_000;

export function planSource(handoff: Handoff): HandoffPlan {
  const { continuity, tunnel, last, next } = handoff;
  if (continuity === 'mptcp' && tunnel && next) {
    const { before, remove } = planPreJoin(handoff, tunnel, next);
    return { before, turn: [], after: [remove] };
  }
  if (continuity === 'stretch' && tunnel) {
    const turn = [planTurn(last, tunnelName(tunnel.vni))];
    return { before: [planHomeEnd(handoff, tunnel)], turn, after: [] };
  }
  if (continuity === 'none' && next)
    return { before: [planPrepare(last, next, lanMtu)], turn: [], after: [] };
  return { before: [], turn: [], after: [] };
}

export function planDestination(handoff: Handoff): HandoffPlan {
  const { owner, vmId, continuity, bridge, serving, waiting = 0, tunnel, last, next } = handoff;
  if (continuity === 'stretch') {
    const before = tunnel ? [planAwayEnd(handoff, tunnel)] : [];
    return { before, turn: [planTurn(last, tapName(vmId, serving))], after: [] };
  }
  if (!next) return { before: [], turn: [], after: [] };
  const finish: Action = { kind: 'guest', step: { name: 'finish', next, last, mtu: lanMtu } };
  if (continuity !== 'mptcp' || !tunnel) return { before: [], turn: [], after: [finish] };
  const { up, down } = planTunnel({ ...tunnel, owner, vmId, bridge });
  return {
    before: [{ name: 'tunnel', run: host(up), undo: host(down) }],
    turn: [planTurn(next, tapName(vmId, waiting))],
    // The tunnel first: with it goes what the bridge had learned, that the VM is at its other end.
    after: [host(down), finish],
  };
}

/** At the home of a VM: its LAN reaches the VM, which is at the other end of the tunnel. */
export function planHomeEnd({ owner, vmId, bridge, last }: Handoff, tunnel: Tunnel): HandoffStep {
  const { up, down } = planTunnel({ ...tunnel, owner, vmId, bridge, mtu: lanMtu });
  const forget: Command = ['ip', 'neighbour', 'delete', addressOf(last), 'dev', requireDeviceName(bridge)];
  return { name: 'tunnel', run: host([...up, knowAway(bridge, last)]), undo: host([forget, ...down]) };
}

/** The gateway is at both ends under one MAC, so the VM's answers to ARP do not come as far as the home. */
export const knowAway = (bridge: string, last: GuestPlace): Command => {
  const place = [addressOf(last), 'dev', requireDeviceName(bridge)];
  return ['ip', 'neighbour', 'replace', ...place, 'lladdr', last.mac, 'nud', 'permanent'];
};

/** Frames for this interface of the VM leave its bridge by the device, until it is heard from elsewhere. */
const planTurn = ({ mac }: GuestPlace, device: string): Action =>
  host([['bridge', 'fdb', 'replace', mac, 'dev', device, 'master', 'dynamic']]);

/** When a stretched VM has left: the bridge, the tunnel, and with them the route. */
export function planAwayEndRemoval(owner: Uuid, vmId: Uuid, serving: number, vni: number): Command[] {
  return [...planTunnelRemoval(vni), ...planIsolation(owner, vmId, serving).down];
}

/** The bridge that the VM's interface joins at this cloudlet, if not the LAN's. */
export function bridgeFor({ vmId, continuity, serving, tunnel }: Handoff, index: number): string | undefined {
  return continuity === 'stretch' && tunnel && index === serving ? isolationName(vmId, serving) : undefined;
}

function planPreJoin(handoff: Handoff, tunnel: Tunnel, next: GuestPlace) {
  const { owner, vmId, bridge, last, waiting = 0 } = handoff;
  const isolation = planIsolation(owner, vmId, waiting);
  const wire = planTunnel({ ...tunnel, owner, vmId, bridge: isolation.name });
  const plug = (into: string): Command => [
    'ip',
    'link',
    'set',
    'dev',
    tapName(vmId, waiting),
    'master',
    into,
  ];
  const remove = host([...wire.down, ...isolation.down]);
  const join = (to: GuestPlace, from: GuestPlace): Action => ({
    kind: 'guest',
    step: { name: 'join', next: to, last: from, waitMs: joinWaitMs },
  });
  const before: HandoffStep[] = [
    {
      name: 'tunnel',
      run: host([...isolation.up, ...wire.up, plug(isolation.name)]),
      undo: host([plug(requireDeviceName(bridge)), ...wire.down, ...isolation.down]),
    },
    planPrepare(last, next, tunnelMtu),
    { name: 'join', run: join(next, last), undo: join(last, next) },
  ];
  return { before, remove };
}

function planPrepare(last: GuestPlace, next: GuestPlace, mtu: number): HandoffStep {
  return {
    name: 'prepare',
    run: { kind: 'guest', step: { name: 'prepare', next, last, mtu } },
    undo: { kind: 'guest', step: { name: 'finish', next: last, last: next, mtu: lanMtu } },
  };
}

function planAwayEnd(handoff: Handoff, tunnel: Tunnel): HandoffStep {
  const { owner, vmId, serving, last, gatewayMac } = handoff;
  const isolation = planIsolation(owner, vmId, serving, {
    mtu: lanMtu,
    ...(gatewayMac === undefined ? {} : { mac: gatewayMac }),
  });
  const wire = planTunnel({ ...tunnel, owner, vmId, bridge: isolation.name, mtu: lanMtu });
  const route: Command[] = [
    // Only where the guest takes this gateway for the one that it knows.
    ...(gatewayMac === undefined
      ? []
      : [
          ['ip', 'address', 'add', `${last.gateway}/32`, 'dev', isolation.name] as const,
          ['ip', 'route', 'add', `${addressOf(last)}/32`, 'dev', isolation.name] as const,
        ]),
  ];
  return {
    name: 'tunnel',
    run: host([...isolation.up, ...wire.up, ...route]),
    undo: host([...wire.down, ...isolation.down]),
  };
}

const host = (commands: Command[]): Action => ({ kind: 'host', commands });
const addressOf = ({ address }: GuestPlace): string => address.split('/')[0]!;
