/**
 * A VM that keeps its address where no LAN is stretched: a route to this one address leads to it. At its home a stand-in,
 * a macvlan on the LAN's bridge with the VM's MAC, takes what the LAN sends to the VM, so that no neighbour there has to
 * learn anything; the host passes it on. Where the VM is, a bridge of its own is the gateway that its guest knows.
 */
import type { Uuid } from '../model/ids.ts';
import type { Command, DevicePlan } from './commands.ts';
import type { GuestPlace } from './guest-network.ts';
import { requireDeviceName } from './networks.ts';
import { aliasOf } from './tap-plan.ts';
import { isolationName, planIsolation, requireAddress } from './tunnel-plan.ts';

/** The device, and the router if there is one between. */
export interface Hop {
  device: string;
  via?: string;
}

interface RoutedVm {
  owner: Uuid;
  vmId: Uuid;
  serving: number;
  last: GuestPlace;
  gatewayMac?: string;
  hop?: Hop;
}

const lanMtu = 1500;

const standInName = (vmId: Uuid, index: number): string => `vipm${vmId.slice(0, 8)}n${index}`;

export const hopCommand = (to: string): Command => ['ip', '-j', 'route', 'get', requireAddress('remote', to)];

/** What `hopCommand` prints; undefined if no route leads there. */
export function parseHop(output: string): Hop | undefined {
  const [found] = JSON.parse(output.trim() || '[]') as { dev?: unknown; gateway?: unknown }[];
  if (typeof found?.dev !== 'string') return undefined;
  return { device: found.dev, ...(typeof found.gateway === 'string' ? { via: found.gateway } : {}) };
}

/** It is not up: the VM itself is still there. */
export function planStandIn({
  owner,
  vmId,
  serving,
  bridge,
  last,
}: RoutedVm & { bridge: string }): DevicePlan {
  const name = standInName(vmId, serving);
  const set = (...words: string[]): Command => ['ip', 'link', 'set', 'dev', name, ...words];
  const on = ['name', name, 'link', requireDeviceName(bridge), 'address', last.mac];
  return {
    name,
    up: [
      ['ip', 'link', 'add', ...on, 'type', 'macvlan', 'mode', 'bridge'],
      set('alias', aliasOf(owner, vmId)),
      set('addrgenmode', 'none'),
      // It answers for the VM at once, where others wait up to a second, lest many answer together.
      ['sysctl', '-q', '-w', `net.ipv4.neigh.${name}.proxy_delay=0`],
      ['ip', 'neighbour', 'add', 'proxy', addressOf(last), 'dev', name],
    ],
    down: [['ip', 'link', 'delete', 'dev', name, 'type', 'macvlan']],
  };
}

/** At home: the LAN and this host send to the VM by the way to where it is. */
export function planWayAway({ vmId, serving, last, hop }: RoutedVm): { up: Command[]; down: Command[] } {
  const name = standInName(vmId, serving);
  const route = `${addressOf(last)}/32`;
  const way = hop
    ? [...(hop.via ? ['via', requireAddress('via', hop.via)] : []), 'dev', requireDeviceName(hop.device)]
    : [];
  return {
    up: [
      ['ip', 'route', 'replace', route, ...way],
      ['ip', 'link', 'set', 'dev', name, 'up'],
    ],
    down: [
      ['ip', 'link', 'set', 'dev', name, 'down'],
      // Nothing there is no error.
      ['ip', 'route', 'flush', 'exact', route],
    ],
  };
}

/** The gateway of the VM where it is. For the neighbours that it knows from home it answers itself. */
export function planGateway({ owner, vmId, serving, last, gatewayMac }: RoutedVm): DevicePlan {
  const isolation = planIsolation(owner, vmId, serving, {
    mtu: lanMtu,
    ...(gatewayMac === undefined ? {} : { mac: gatewayMac }),
  });
  const { name, up, down } = isolation;
  const settings = [`net.ipv4.conf.${name}.proxy_arp=1`, `net.ipv4.neigh.${name}.proxy_delay=0`];
  return {
    name,
    up: [
      ...up,
      ['sysctl', '-q', '-w', ...settings],
      ['ip', 'address', 'add', `${last.gateway}/32`, 'dev', name],
      // The guest's answer to ARP would come only when it runs.
      ['ip', 'neighbour', 'replace', addressOf(last), 'dev', name, 'lladdr', last.mac, 'nud', 'permanent'],
    ],
    down,
  };
}

/** Where the VM is: this host sends to it by its bridge. */
export function planWayIn({ vmId, serving, last }: RoutedVm): { up: Command[]; down: Command[] } {
  const route = [`${addressOf(last)}/32`, 'dev', isolationName(vmId, serving)];
  return { up: [['ip', 'route', 'replace', ...route]], down: [['ip', 'route', 'flush', 'exact', ...route]] };
}

const addressOf = ({ address }: GuestPlace): string => address.split('/')[0]!;
