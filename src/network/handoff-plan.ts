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
 *   host-route  before: the destination has a bridge for the VM alone, with the MAC and the address of the gateway that its
 *             guest knows; the LAN of the VM's home gets a stand-in with the VM's MAC, which is not up. When the VM stands
 *             still, the stand-in comes up and a route to the VM's one address leads to the destination, and there to its
 *             tap. No tunnel: what is between the two must carry packets of that address. Back again if the VM stays.
 *   none      before: the address is reserved. After: the guest takes it.
 *
 * As soon as the VM stands still, frames for it are turned to where it will run: they wait in the queue of its tap there
 * and are the first that it hears. Else they are lost, and TCP's next try is up to a second later.
 */
import type { Uuid } from '../model/ids.ts';
import type { Continuity } from '../model/vm.ts';
import type { Command } from './commands.ts';
import type { GuestPlace, GuestStep } from './guest-network.ts';
import { type Hop, planGateway, planStandIn, planWayAway, planWayIn } from './host-route-plan.ts';
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
  /** As this cloudlet's end of it; missing when there is none. Of a host route: whom it leads to, or comes from. */
  tunnel?: Tunnel;
  /** The first step from this cloudlet to the other one; for a host route. */
  hop?: Hop;
  /** At the source: the VM is away from home here. */
  isAway?: true;
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
  /** When the VM stands still. */
  turn: Action[];
  /**
   * When it is let run here after all. Nothing for bridges, which learn where a VM is from the first frame that it sends.
   */
  turnBack: Action[];
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
    return { ...nothing, before, after: [remove] };
  }
  if (continuity === 'stretch' && tunnel)
    return { ...nothing, before: [planHomeEnd(handoff)], turn: [planTurn(last, tunnelName(tunnel.vni))] };
  if (continuity === 'host-route') return planRouteAway(handoff);
  if (continuity === 'none' && next) return { ...nothing, before: [planPrepare(last, next, lanMtu)] };
  return nothing;
}

export function planDestination(handoff: Handoff): HandoffPlan {
  const { owner, vmId, continuity, bridge, serving, waiting = 0, tunnel, last, next } = handoff;
  if (continuity === 'stretch') {
    const before = tunnel ? [planAwayEnd(handoff, tunnel)] : [];
    return { ...nothing, before, turn: [planTurn(last, tapName(vmId, serving))] };
  }
  if (continuity === 'host-route') return planRouteIn(handoff);
  if (!next) return nothing;
  const finish: Action = { kind: 'guest', step: { name: 'finish', next, last, mtu: lanMtu } };
  if (continuity !== 'mptcp' || !tunnel) return { ...nothing, after: [finish] };
  const { up, down } = planTunnel({ ...tunnel, owner, vmId, bridge });
  return {
    ...nothing,
    before: [{ name: 'tunnel', run: host(up), undo: host(down) }],
    turn: [planTurn(next, tapName(vmId, waiting))],
    // The tunnel first: with it goes what the bridge had learned, that the VM is at its other end.
    after: [host(down), finish],
  };
}

const nothing: HandoffPlan = { before: [], turn: [], turnBack: [], after: [] };

/** At the home of a VM that is away: what makes its LAN reach it, once frames and packets are turned. */
export function planHomeEnd(handoff: Handoff): HandoffStep {
  const { owner, vmId, bridge, last, continuity, serving, tunnel } = handoff;
  if (continuity === 'host-route') {
    const { up, down } = planStandIn({ owner, vmId, serving, bridge, last });
    const back = planWayAway(handoff).down;
    return { name: 'stand-in', run: host(up), undo: host([...back, ...down]) };
  }
  const { up, down } = planTunnel({ ...tunnel!, owner, vmId, bridge, mtu: lanMtu });
  const forget: Command = ['ip', 'neighbour', 'delete', addressOf(last), 'dev', requireDeviceName(bridge)];
  return { name: 'tunnel', run: host([...up, knowAway(bridge, last)]), undo: host([forget, ...down]) };
}

/** At the home of a VM: whatever leads to it leads to its new place. */
export const planHomeTurn = (handoff: Handoff): Action[] =>
  handoff.continuity === 'host-route'
    ? [host(planWayAway(handoff).up)]
    : [host([knowAway(handoff.bridge, handoff.last)])];

/** From the home, and from where a VM is that goes on to a third cloudlet or home: there the way in ends. */
function planRouteAway(handoff: Handoff): HandoffPlan {
  if (!handoff.isAway) {
    const way = planWayAway(handoff);
    const turn = [host(way.up)];
    return { before: [planHomeEnd(handoff)], turn, turnBack: [host(way.down)], after: [] };
  }
  const way = planWayIn(handoff);
  return { ...nothing, turn: [host(way.down)], turnBack: [host(way.up)] };
}

/** Without another end the VM comes home, and the stand-in steps aside. */
function planRouteIn(handoff: Handoff): HandoffPlan {
  const { vmId, serving, last, tunnel } = handoff;
  if (!tunnel) {
    const turn = [planTurn(last, tapName(vmId, serving)), host(planWayAway(handoff).down)];
    return { ...nothing, turn };
  }
  const { up, down } = planGateway(handoff);
  const before = [{ name: 'gateway', run: host(up), undo: host(down) }];
  return { ...nothing, before, turn: [host(planWayIn(handoff).up)] };
}

/** The gateway is at both ends under one MAC, so the VM's answers to ARP do not come as far as the home. */
const knowAway = (bridge: string, last: GuestPlace): Command => {
  const place = [addressOf(last), 'dev', requireDeviceName(bridge)];
  return ['ip', 'neighbour', 'replace', ...place, 'lladdr', last.mac, 'nud', 'permanent'];
};

/** Frames for this interface of the VM leave its bridge by the device, until it is heard from elsewhere. */
const planTurn = ({ mac }: GuestPlace, device: string): Action =>
  host([['bridge', 'fdb', 'replace', mac, 'dev', device, 'master', 'dynamic']]);

/** When a VM has left that was away from home: its bridge, its tunnel if there is one, and with them the route. */
export function planAwayEndRemoval({ continuity, owner, vmId, serving, tunnel }: Handoff): Command[] {
  const wire = continuity === 'stretch' && tunnel ? planTunnelRemoval(tunnel.vni) : [];
  return [...wire, ...planIsolation(owner, vmId, serving).down];
}

/** The bridge that the VM's interface joins at this cloudlet, if not the LAN's. */
export function bridgeFor({ vmId, continuity, serving, tunnel }: Handoff, index: number): string | undefined {
  const isIsolated = keepsAddress(continuity) && tunnel && index === serving;
  return isIsolated ? isolationName(vmId, serving) : undefined;
}

/** The VM is at home where it was, wherever it runs. */
export const keepsAddress = (continuity: Continuity): boolean =>
  continuity === 'stretch' || continuity === 'host-route';

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
