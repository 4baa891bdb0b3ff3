/** The networks of a cloudlet, by the names that VMs join them under. */
import { AppError } from '../model/errors.ts';
import type { AddressPlan } from './addresses.ts';

export type CloudletNetwork =
  /** Outbound only, through QEMU itself; needs no rights and no device on the host. */
  | { name: 'user'; kind: 'user' }
  /** A Linux bridge of the host; each interface gets a tap on it. With `addresses`, the cloudlet gives them out. */
  | { name: string; kind: 'bridge'; bridge: string; addresses?: AddressPlan };

export const userNetwork: CloudletNetwork = { name: 'user', kind: 'user' };

/** The network of that name. Throws `unsupported` that lists the networks there are. */
export function findNetwork(networks: readonly CloudletNetwork[], name: string): CloudletNetwork {
  const found = networks.find((network) => network.name === name);
  if (found) return found;
  const names = networks.map((network) => network.name);
  throw new AppError('unsupported', `Join network: it is '${name}', wanted one of ${names.join(', ')}`, {
    missing: `network ${name}`,
    networks: names,
  });
}

/** A name that Linux takes for a network device and that no program takes for an option. */
export function requireDeviceName(name: string): string {
  if (/^[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,14}$/.test(name)) return name;
  const wanted = '1 to 15 letters, digits, dots, hyphens and underscores';
  throw new AppError('invalid_request', `Name network device: '${name}', wanted ${wanted}`, {
    problems: [{ field: 'bridge', value: name, wanted }],
  });
}
