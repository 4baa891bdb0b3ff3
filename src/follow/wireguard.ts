/** The WireGuard configuration of one cloudlet for one VPN group, in the format of wg-quick(8). Pure text. */
import type { Uuid } from '../model/ids.ts';
import type { Group } from './groups.ts';

export interface WireguardSite {
  cloudletId: Uuid;
  name: string;
  /** Host or address and port at which the others reach it. */
  endpoint: { host: string; port: number };
  /** Base64 of 32 bytes. */
  publicKey: string;
  /** Its own in the tunnel, such as 10.200.0.2/24. */
  address?: string;
  /** LAN prefixes behind it; they differ within a group. */
  lans: readonly string[];
}

export interface WireguardConfig {
  interfaceName: string;
  text: string;
}

const keyPattern = /^[A-Za-z0-9+/]{43}=$/;
const hostPattern = /^[A-Za-z0-9.:-]{1,253}$/;
const prefixPattern = /^\d{1,3}(\.\d{1,3}){3}\/\d{1,2}$/;

/**
 * For the cloudlet `own`, whose private key stays in a file of its own that wg-quick reads after the interface is
 * up: no secret is in the text. `address` is the cloudlet's own within the tunnel, such as 10.200.0.1/24.
 * Throws a RangeError that names the field for anything that would not be a value but a line of configuration, and
 * for LANs of two members that are the same.
 */
export function wireguardConfig(
  group: Group,
  own: Uuid,
  sites: ReadonlyMap<Uuid, WireguardSite>,
  { address, listenPort, privateKeyFile }: { address: string; listenPort: number; privateKeyFile: string },
): WireguardConfig {
  require_('address', address, prefixPattern);
  require_('privateKeyFile', privateKeyFile, /^\/[\w./-]{1,200}$/);
  if (!group.members.includes(own)) throw new RangeError(`Cloudlet ${own} is not in group '${group.name}'`);
  const others = group.members
    .filter((id) => id !== own)
    .map((id) => sites.get(id))
    .filter((site) => site !== undefined);
  requireDistinctLans([...others, ...(sites.has(own) ? [sites.get(own)!] : [])]);
  const interfaceName = `vpr-${group.name}`.slice(0, 15);
  const lines = [
    `# VPN group ${group.name}; wg-quick up ${interfaceName}`,
    '[Interface]',
    `Address = ${address}`,
    `ListenPort = ${listenPort}`,
    `PostUp = wg set %i private-key ${privateKeyFile}`,
  ];
  for (const { name, endpoint, publicKey, address: itsAddress, lans } of others) {
    require_(`publicKey of ${name}`, publicKey, keyPattern);
    require_(`host of ${name}`, endpoint.host, hostPattern);
    const within = [...(itsAddress === undefined ? [] : [`${itsAddress.split('/')[0]}/32`]), ...lans];
    for (const prefix of within) require_(`LAN of ${name}`, prefix, prefixPattern);
    const host = endpoint.host.includes(':') ? `[${endpoint.host}]` : endpoint.host;
    lines.push(
      '',
      `# ${name.replaceAll(/[^a-z0-9-]/g, '')}`,
      '[Peer]',
      `PublicKey = ${publicKey}`,
      `Endpoint = ${host}:${endpoint.port}`,
      `AllowedIPs = ${within.join(', ')}`,
      'PersistentKeepalive = 25',
    );
  }
  return { interfaceName, text: `${lines.join('\n')}\n` };
}

/** Throws as `wireguardConfig` does. */
export function requireDistinctLans(sites: readonly WireguardSite[]): void {
  const owners = new Map<string, string>();
  for (const { name, lans } of sites) {
    for (const lan of lans) {
      const other = owners.get(lan);
      if (other) throw new RangeError(`The LAN ${lan} of ${name} is that of ${other}, wanted one of its own`);
      owners.set(lan, name);
    }
  }
}

function require_(field: string, value: string, pattern: RegExp): void {
  if (!pattern.test(value)) throw new RangeError(`${field} is '${value}', wanted ${pattern}`);
}
