/**
 * The WireGuard interface of a cloudlet towards the members of its VPN groups: one for all of them, as a key and a port
 * are one cloudlet's. Made by the kernel, or where that has no WireGuard by wireguard-go. Pure.
 */
import type { Uuid } from '../model/ids.ts';
import type { Command } from './commands.ts';

export interface WireguardPeer {
  publicKey: string;
  /** HOST:PORT. */
  endpoint: string;
  /** Its own address in the tunnel, and its LANs. */
  allowedIps: readonly string[];
}

export interface WireguardInterface {
  /** The cloudlet. */
  owner: Uuid;
  /** Of the cloudlet in the tunnel, such as 10.200.0.1/24. */
  address: string;
  listenPort: number;
  privateKeyFile: string;
  peers: readonly WireguardPeer[];
}

/** Routes of the host's own go before those through the tunnel. */
const metric = '1000';
const mtu = '1420';

/** Another one at each cloudlet: programs in several namespaces share one directory of sockets. */
const wireguardName = (owner: Uuid): string => `vipw${owner.slice(0, 8)}`;

export const makeInKernel = (owner: Uuid): Command => [
  'ip',
  'link',
  'add',
  'dev',
  wireguardName(owner),
  'type',
  'wireguard',
];
/** It goes to the background once the interface is there, and ends with it. */
export const makeInUserSpace = (owner: Uuid): Command => ['wireguard-go', wireguardName(owner)];

export const listPeersCommand = (owner: Uuid): Command => ['wg', 'show', wireguardName(owner), 'peers'];

/** Brings an interface that is there to what is wanted; `known` are the public keys of the peers that it has. */
export function planWireguard(wanted: WireguardInterface, known: readonly string[]): Command[] {
  const { owner, address, listenPort, privateKeyFile, peers } = wanted;
  const name = wireguardName(owner);
  const keys = new Set(peers.map(({ publicKey }) => publicKey));
  const gone = known.filter((key) => !keys.has(key)).flatMap((key) => ['peer', key, 'remove']);
  const set = peers.flatMap(({ publicKey, endpoint, allowedIps }) => [
    ...['peer', publicKey, 'endpoint', endpoint],
    ...['persistent-keepalive', '25', 'allowed-ips', allowedIps.join(',')],
  ]);
  const own = ['listen-port', String(listenPort), 'private-key', privateKeyFile];
  const routes = peers.flatMap(({ allowedIps }) => allowedIps.filter((prefix) => !prefix.endsWith('/32')));
  return [
    ['wg', 'set', name, ...own, ...gone, ...set],
    ['ip', 'address', 'replace', address, 'dev', name],
    ['ip', 'link', 'set', 'dev', name, 'mtu', mtu, 'up'],
    ...routes.map((prefix): Command => ['ip', 'route', 'replace', prefix, 'dev', name, 'metric', metric]),
  ];
}

export const planWireguardRemoval = (owner: Uuid): Command[] => [
  ['ip', 'link', 'delete', 'dev', wireguardName(owner)],
];
