/**
 * A VXLAN tunnel between two cloudlets that carries one VM's frames and nobody else's: a point-to-point wire of two
 * ends, each plugged into a bridge. Its name and number are made from one random number, so that several tunnels of a
 * VM can stand at a time; the alias says whose it is. The frames are not encrypted: let the cloudlets' addresses be
 * those of a VPN where the WAN is not trusted.
 */
import { isIPv4 } from 'node:net';
import { AppError } from '../model/errors.ts';
import type { Uuid } from '../model/ids.ts';
import type { Command, DevicePlan } from './commands.ts';
import type { Link } from './links.ts';
import { requireDeviceName } from './networks.ts';
import { aliasOf } from './tap-plan.ts';

/** Not VXLAN's own 4789, which other software of the host may hold. */
export const tunnelPort = 4790;
/** What is left of 1500 bytes under the outer headers. */
export const tunnelMtu = 1450;

export interface Tunnel {
  /** VXLAN network identifier, 1 to 2^24 - 1. */
  vni: number;
  /** This cloudlet's address, and the other's. */
  local: string;
  remote: string;
}

export interface TunnelRequest extends Tunnel {
  owner: Uuid;
  vmId: Uuid;
  /** Into which this end is plugged. */
  bridge: string;
  /** `tunnelMtu` if absent. Above it the outer packets travel in fragments. */
  mtu?: number;
}

const mostVni = 2 ** 24 - 1;
const ownTunnel = /^vipx[0-9a-f]{6}$/;
const ownStandIn = /^vipm[0-9a-f]{8}n[0-9]{1,2}$/;
const ownBridge = /^vipb[0-9a-f]{8}n[0-9]{1,2}$/;

export const newVni = (): number => 1 + Math.floor(Math.random() * mostVni);
export const tunnelName = (vni: number): string => `vipx${requireVni(vni).toString(16).padStart(6, '0')}`;

export function planTunnel({
  owner,
  vmId,
  bridge,
  vni,
  local,
  remote,
  mtu = tunnelMtu,
}: TunnelRequest): DevicePlan {
  const name = tunnelName(vni);
  const [from, to] = [requireAddress('local', local), requireAddress('remote', remote)];
  const set = (...words: string[]): Command => ['ip', 'link', 'set', 'dev', name, ...words];
  const wire = ['id', String(vni), 'local', from, 'remote', to, 'dstport', String(tunnelPort)];
  return {
    name,
    up: [
      // What comes in is taken for the other end's, whoever it says that it is from.
      ['ip', 'link', 'add', 'name', name, 'type', 'vxlan', ...wire, 'nolearning', 'df', 'unset'],
      set('alias', aliasOf(owner, vmId)),
      set('addrgenmode', 'none'),
      set('mtu', String(mtu)),
      set('master', requireDeviceName(bridge)),
      set('up'),
    ],
    down: planTunnelRemoval(vni),
  };
}

export const planTunnelRemoval = (vni: number): Command[] => [
  ['ip', 'link', 'delete', 'dev', tunnelName(vni), 'type', 'vxlan'],
];

/** The bridge that joins one interface of a VM to a tunnel instead of to the LAN. */
export const isolationName = (vmId: Uuid, index: number): string => `vipb${vmId.slice(0, 8)}n${index}`;

/** `mac`: of the LAN's gateway, where the host takes that part in it. */
export function planIsolation(
  owner: Uuid,
  vmId: Uuid,
  index: number,
  { mac, mtu = tunnelMtu }: { mac?: string; mtu?: number } = {},
): DevicePlan {
  const name = isolationName(vmId, index);
  const set = (...words: string[]): Command => ['ip', 'link', 'set', 'dev', name, ...words];
  return {
    name,
    up: [
      ['ip', 'link', 'add', 'name', name, 'type', 'bridge', 'stp_state', '0', 'forward_delay', '0'],
      set('alias', aliasOf(owner, vmId)),
      set('addrgenmode', 'none'),
      ...(mac === undefined ? [] : [set('address', mac)]),
      set('mtu', String(mtu)),
      set('up'),
    ],
    down: [['ip', 'link', 'delete', 'dev', name, 'type', 'bridge']],
  };
}

/** Tunnels, bridges and stand-ins of this cloudlet, by VM. */
export function ownTunnelDevices(links: readonly Link[], owner: Uuid): { link: Link; vmId: Uuid }[] {
  const beginning = aliasOf(owner, '');
  return links.flatMap((link) => {
    const isOurs =
      (link.kind === 'vxlan' && ownTunnel.test(link.name)) ||
      (link.kind === 'macvlan' && ownStandIn.test(link.name)) ||
      (link.kind === 'bridge' && ownBridge.test(link.name));
    if (!isOurs || !link.alias?.startsWith(beginning)) return [];
    return [{ link, vmId: link.alias.slice(beginning.length) }];
  });
}

function requireVni(vni: number): number {
  if (Number.isInteger(vni) && vni >= 1 && vni <= mostVni) return vni;
  throw refusal('vni', vni, `1 to ${mostVni}`);
}

export function requireAddress(field: string, address: string): string {
  if (isIPv4(address)) return address;
  throw refusal(field, address, 'an IPv4 address');
}

const refusal = (field: string, value: unknown, wanted: string): AppError =>
  new AppError('invalid_request', `Make tunnel: ${field} is '${value}', wanted ${wanted}`, {
    problems: [{ field, value, wanted }],
  });
