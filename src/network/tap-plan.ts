/**
 * The taps of VMs as plans. A tap is ours if its name says so, it is a tap, and the alias on it names this cloudlet:
 * two cloudlets may share a host, and nobody may lose a device because of how it is named.
 */
import { AppError } from '../model/errors.ts';
import { isUuid, type Uuid } from '../model/ids.ts';
import type { DevicePlan } from './commands.ts';
import type { Link } from './links.ts';
import { requireDeviceName } from './networks.ts';

export interface TapRequest {
  /** The cloudlet that the tap belongs to. */
  owner: Uuid;
  vmId: Uuid;
  /** Which interface of the VM, from 0. */
  index: number;
  bridge: string;
  /** Of the bridge, else a packet that the guest sends may be too large for it. */
  mtu?: number;
}

const maxInterfaces = 100;
const ownName = /^vip[0-9a-f]{8}n[0-9]{1,2}$/;

/** `vip`, 8 hex digits of the VM's id, `n`, the index: 14 characters at most, Linux allows 15. */
export function tapName(vmId: Uuid, index: number): string {
  if (!isUuid(vmId)) throw new TypeError(`vmId is '${vmId}', wanted a UUID`);
  if (!Number.isInteger(index) || index < 0 || index >= maxInterfaces)
    throw new AppError('invalid_request', `Name tap: interface ${index}, wanted 0 to ${maxInterfaces - 1}`, {
      problems: [{ field: 'nets', value: index, wanted: `at most ${maxInterfaces} interfaces` }],
    });
  return `vip${vmId.slice(0, 8)}n${index}`;
}

/** Whether a name has the form of our taps. Alone it is no proof: see `tapsOf`. */
export const isTapName = (name: string): boolean => ownName.test(name);

export function planTap({ owner, vmId, index, bridge, mtu }: TapRequest): DevicePlan {
  const name = tapName(vmId, index);
  const master = requireDeviceName(bridge);
  return {
    name,
    up: [
      ['ip', 'tuntap', 'add', 'dev', name, 'mode', 'tap'],
      ['ip', 'link', 'set', 'dev', name, 'alias', aliasOf(owner, vmId)],
      // The host is no party on this wire: it takes no address of its own there.
      ['ip', 'link', 'set', 'dev', name, 'addrgenmode', 'none'],
      ...(mtu === undefined ? [] : [['ip', 'link', 'set', 'dev', name, 'mtu', String(mtu)] as const]),
      ['ip', 'link', 'set', 'dev', name, 'master', master],
      ['ip', 'link', 'set', 'dev', name, 'up'],
    ],
    down: removal(name),
  };
}

/** Takes away a tap that is known by name only. */
export const planTapRemoval = (name: string): DevicePlan => ({ name, up: [], down: removal(name) });

const removal = (name: string): DevicePlan['down'] => [['ip', 'tuntap', 'del', 'dev', name, 'mode', 'tap']];

/** The taps of one VM of this cloudlet; also one without an alias, left by a daemon killed while it made it. */
export function tapsOf(links: readonly Link[], owner: Uuid, vmId: Uuid): Link[] {
  const prefix = `vip${vmId.slice(0, 8)}n`;
  return links.filter(
    ({ name, kind, alias }) =>
      kind === 'tun' &&
      isTapName(name) &&
      name.startsWith(prefix) &&
      (alias === undefined || alias === aliasOf(owner, vmId)),
  );
}

/** The taps of this cloudlet whose VM is not one of `vmIds`. */
export function strayTaps(links: readonly Link[], owner: Uuid, vmIds: Iterable<Uuid>): Link[] {
  const kept = new Set(Array.from(vmIds, (vmId) => aliasOf(owner, vmId)));
  return links.filter(
    ({ name, kind, alias }) =>
      kind === 'tun' && isTapName(name) && alias?.startsWith(`viper:${owner}:`) && !kept.has(alias),
  );
}

export const aliasOf = (owner: Uuid, vmId: Uuid): string => `viper:${owner}:${vmId}`;
