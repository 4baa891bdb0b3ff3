/** Whether a device is in a LAN of this cloudlet: what the kernel has learned of neighbours on the bridges. */

import { isIP } from 'node:net';
import { networkInterfaces } from 'node:os';
import type { CloudletNetwork } from '../../network/index.ts';
import { run } from '../../vm/run.ts';

export interface Sighting {
  sees: boolean;
  /** Its address in the LAN, if known. */
  address?: string;
}

/** One entry of `ip -j neigh`. */
interface Entry {
  dst?: unknown;
  lladdr?: unknown;
  state?: unknown;
}

const maxEntries = 10_000;
const timeoutMs = 1000;

const bridgesOf = (networks: readonly CloudletNetwork[]): string[] =>
  networks.flatMap((network) => ('bridge' in network ? [network.bridge] : []));

/** The IPv4 prefixes of the bridges, such as 10.4.0.0/24: as configured, else those of the bridge while it is up. */
export function lansOf(networks: readonly CloudletNetwork[], devices = networkInterfaces()): string[] {
  const all = networks.flatMap((network) => {
    if (!('bridge' in network)) return [];
    if (network.addresses) return [networkOf(network.addresses.subnet)];
    const addresses = devices[network.bridge] ?? [];
    return addresses.flatMap(({ family, cidr }) => (family === 'IPv4' && cidr ? [networkOf(cidr)] : []));
  });
  return [...new Set(all)];
}

/** `10.4.0.1/24` as `10.4.0.0/24`. */
export function networkOf(cidr: string): string {
  const [address = '', length = ''] = cidr.split('/');
  const value = address.split('.').reduce((sum, part) => sum * 256 + Number(part), 0);
  const size = 2 ** (32 - Number(length));
  const first = Math.floor(value / size) * size;
  return `${[24, 16, 8, 0].map((shift) => Math.floor(first / 2 ** shift) % 256).join('.')}/${length}`;
}

/** Looks for the device by its MACs first, as addresses change. */
export async function lookFor(
  networks: readonly CloudletNetwork[],
  device: { macs: readonly string[]; addresses: readonly string[] },
): Promise<Sighting> {
  const signal = AbortSignal.timeout(timeoutMs);
  const tables = await Promise.all(
    bridgesOf(networks).map(async (bridge) => ({
      neighbours: await listOf('ip', ['-j', 'neigh', 'show', 'dev', bridge], signal),
      forwarding: await listOf('bridge', ['-j', 'fdb', 'show', 'br', bridge], signal),
    })),
  );
  return sightingIn(tables, device);
}

/** The decision of `lookFor`, without I/O. */
export function sightingIn(
  tables: readonly { neighbours: readonly unknown[]; forwarding: readonly unknown[] }[],
  { macs, addresses }: { macs: readonly string[]; addresses: readonly string[] },
): Sighting {
  const neighbours = tables.flatMap((table) => table.neighbours as Entry[]).filter(isAlive);
  const byMac = neighbours.find(({ lladdr }) => macs.includes(String(lladdr)));
  const byAddress = neighbours.find(({ dst }) => addresses.includes(String(dst)));
  // A neighbour with the address but another card is somebody else, when we know the cards.
  const found = byMac ?? (macs.length === 0 ? byAddress : undefined);
  if (found) return { sees: true, ...(isIP(String(found.dst)) ? { address: String(found.dst) } : {}) };
  const forwarding = tables.flatMap((table) => table.forwarding as { mac?: unknown }[]);
  return { sees: forwarding.some(({ mac }) => macs.includes(String(mac))) };
}

const isAlive = ({ state, lladdr }: Entry): boolean =>
  typeof lladdr === 'string' &&
  Array.isArray(state) &&
  !state.some((each) => ['FAILED', 'INCOMPLETE', 'NOARP'].includes(String(each)));

/** What cannot be read is not seen. */
async function listOf(program: string, args: string[], signal: AbortSignal): Promise<unknown[]> {
  try {
    const { stdout } = await run(program, args, { signal, timeoutMs, maxOutputBytes: 4_000_000 });
    const list: unknown = stdout.trim() === '' ? [] : JSON.parse(stdout);
    return Array.isArray(list) ? list.slice(0, maxEntries) : [];
  } catch {
    return [];
  }
}
