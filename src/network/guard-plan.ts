/**
 * What guests may send, as nftables: from each tap only frames of the VM's own MAC and, where the cloudlet gives the
 * addresses, only packets and ARP of the addresses that the VM has. And what comes for a tunnel is taken from its other
 * end alone. The rules stand; which taps, MACs and addresses they speak of are sets, which each change fills anew in one
 * transaction, so that at no moment a VM is unguarded.
 */
import { isIPv4 } from 'node:net';
import { AppError } from '../model/errors.ts';
import { isUuid, macPattern, type Uuid } from '../model/ids.ts';
import type { Command } from './commands.ts';
import { isTapName } from './tap-plan.ts';
import { tunnelPort } from './tunnel-plan.ts';

export interface GuardedTap {
  tap: string;
  mac: string;
  /** Without prefix length. Missing: whatever the guest says, as nobody here gave it one. */
  addresses?: readonly string[];
}

export interface Guarded {
  taps: readonly GuardedTap[];
  /** The cloudlets at the other ends of tunnels. */
  tunnelRemotes: readonly string[];
}

const mac = new RegExp(macPattern);

/** Several cloudlets may share a host: each has tables of its own. */
export function guardTable(owner: Uuid): string {
  if (!isUuid(owner)) throw new TypeError(`owner is '${owner}', wanted a UUID`);
  return `viper_${owner.slice(0, 8)}`;
}

/** One command, all of it or nothing. */
export function planGuard(owner: Uuid, { taps, tunnelRemotes }: Guarded): Command {
  for (const each of taps) check(each);
  for (const remote of tunnelRemotes) requireAddress('tunnelRemotes', remote);
  const table = guardTable(owner);
  const addressed = taps.filter(({ addresses }) => addresses);
  const elements: [set: string, type: string, items: string[]][] = [
    ['taps', 'ifname', taps.map(({ tap }) => `"${tap}"`)],
    ['macs', 'ifname . ether_addr', taps.map((each) => `"${each.tap}" . ${each.mac}`)],
    ['addressed', 'ifname', addressed.map(({ tap }) => `"${tap}"`)],
    [
      'addresses',
      'ifname . ipv4_addr',
      addressed.flatMap(({ tap, addresses = [] }) => addresses.map((address) => `"${tap}" . ${address}`)),
    ],
  ];
  const remotes = [...new Set(tunnelRemotes)];
  return [
    'nft',
    [
      `add table bridge ${table}`,
      ...elements.flatMap(([set, type, items]) => fill(`bridge ${table} ${set}`, type, items)),
      ...chain(`bridge ${table} from_guests`, 'hook prerouting priority -300', fromGuests),
      `add table inet ${table}`,
      ...fill(`inet ${table} remotes`, 'ipv4_addr', remotes),
      ...chain(`inet ${table} tunnels`, 'hook input priority -300', [
        `udp dport ${tunnelPort} ip saddr != @remotes counter drop`,
      ]),
    ].join('\n'),
  ];
}

/** Takes all of it away. */
export const planGuardRemoval = (owner: Uuid): Command[] =>
  ['bridge', 'inet'].map((family): Command => ['nft', 'delete', 'table', family, guardTable(owner)]);

const fromGuests = [
  'iifname != @taps accept',
  'iifname . ether saddr != @macs counter drop',
  'iifname != @addressed accept',
  'ether type arp iifname . arp saddr ip @addresses accept',
  // A guest that asks whether an address is free has none yet.
  'ether type arp arp saddr ip 0.0.0.0 accept',
  'ether type ip iifname . ip saddr @addresses accept',
  'ether type ip ip saddr 0.0.0.0 udp sport 68 udp dport 67 accept',
  // No address of IPv6 is given out; link-local ones lead no further than the LAN.
  'ether type ip6 ip6 saddr fe80::/10 accept',
  'ether type ip6 ip6 saddr :: accept',
  // With these QEMU tells the LAN where the VM is, when it has moved.
  'ether type 0x8035 accept',
  'counter drop',
];

const fill = (set: string, type: string, items: string[]): string[] => [
  `add set ${set} { type ${type}; }`,
  `flush set ${set}`,
  ...(items.length > 0 ? [`add element ${set} { ${items.join(', ')} }`] : []),
];

const chain = (name: string, hook: string, rules: string[]): string[] => [
  `add chain ${name} { type filter ${hook}; policy accept; }`,
  `flush chain ${name}`,
  ...rules.map((rule) => `add rule ${name} ${rule}`),
];

/** They become part of a language: nothing else may be in them. */
function check({ tap, mac: address, addresses = [] }: GuardedTap): void {
  if (!isTapName(tap)) throw refusal('tap', tap, 'the name of a tap of ours');
  if (!mac.test(address)) throw refusal('mac', address, 'a MAC address in lower case');
  for (const each of addresses) requireAddress('addresses', each);
}

function requireAddress(field: string, value: string): void {
  if (!isIPv4(value)) throw refusal(field, value, 'an IPv4 address');
}

const refusal = (field: string, value: string, wanted: string): AppError =>
  new AppError('invalid_request', `Guard taps: ${field} is '${value}', wanted ${wanted}`, {
    problems: [{ field, value, wanted }],
  });
