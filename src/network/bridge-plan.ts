/**
 * A Linux bridge that Viper makes and may take away again. A bridge that somebody else made is only used, never
 * changed: the alias tells them apart.
 */
import { isIP } from 'node:net';
import { AppError } from '../model/errors.ts';
import type { DevicePlan } from './commands.ts';
import type { Link } from './links.ts';
import { requireDeviceName } from './networks.ts';

export interface BridgeRequest {
  name: string;
  /** The host's own address on it, with prefix length: `10.0.0.1/24`. */
  address?: string;
  /** Without one the bridge takes over the lowest MAC of its ports and changes it under the guests' eyes. */
  mac?: string;
  mtu?: number;
}

const alias = 'viper:bridge';

/** Whether Viper made this bridge and may remove it. */
export const isOwnBridge = (link: Link): boolean => link.kind === 'bridge' && link.alias === alias;

/** A plan that is empty where a bridge of that name stands already. Throws `unsupported` when it is something else. */
export function planBridge(request: BridgeRequest, links: readonly Link[] = []): DevicePlan {
  const { address, mac, mtu } = request;
  const name = requireDeviceName(request.name);
  const present = links.find((link) => link.name === name);
  if (present && present.kind !== 'bridge')
    throw new AppError(
      'unsupported',
      `Make bridge ${name}: it is ${present.kind ?? 'another device'}, wanted none`,
      {
        missing: `bridge ${name}`,
      },
    );
  if (address !== undefined) requireAddress(address);
  const set = (...words: string[]) => ['ip', 'link', 'set', 'dev', name, ...words] as const;
  const up: DevicePlan['up'] = [
    // No spanning tree and no delay: a tap that joins carries packets at once.
    ['ip', 'link', 'add', 'name', name, 'type', 'bridge', 'stp_state', '0', 'forward_delay', '0'],
    set('alias', alias),
    ...(mac === undefined ? [] : [set('address', mac)]),
    ...(mtu === undefined ? [] : [set('mtu', String(mtu))]),
    ...(address === undefined ? [] : [['ip', 'address', 'add', address, 'dev', name] as const]),
    set('up'),
  ];
  const ours = present === undefined || isOwnBridge(present);
  return {
    name,
    up: present ? [] : up,
    down: ours ? [['ip', 'link', 'delete', 'dev', name, 'type', 'bridge']] : [],
  };
}

function requireAddress(address: string): void {
  const [host = '', prefix = ''] = address.split('/');
  const maxPrefix = { 0: -1, 4: 32, 6: 128 }[isIP(host)] ?? -1;
  if (address === `${host}/${prefix}` && /^\d{1,3}$/.test(prefix) && Number(prefix) <= maxPrefix) return;
  throw new AppError(
    'invalid_request',
    `Make bridge: address is '${address}', wanted address/prefix length`,
    {
      problems: [{ field: 'address', value: address, wanted: 'address/prefix length' }],
    },
  );
}
