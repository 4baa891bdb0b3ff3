/**
 * A user's device as commands: a namespace whose one radio is in one LAN at a time. A walk takes the radio link's
 * far end out of one cloudlet's bridge and, after the gap, puts it into the next one's; at the device that is a link
 * that goes down and comes back elsewhere, with another address.
 */
import type { Command } from '../network/index.ts';
import { accessPoint, cellularDevice, type LabDevice, lanBridge, radioDevice, type Site } from './layout.ts';
import { inNamespace, planNamespace } from './namespaces.ts';
import type { WireSettings } from './spec.ts';
import { type Emulator, planShape } from './wire.ts';

/** Routes of the radio come before those of the cellular link, which stays the way out while there is no LAN. */
const radioMetric = '100';
const cellularMetric = '1000';
/** What has the cellular address as its own leaves by the cellular link, also while there is a LAN. */
const cellularTable = '100';

export const planDevice = ({ namespace }: LabDevice): Command[] => [
  ...planNamespace(namespace, { forwards: false }),
  // Room for a path to each cloudlet that the VM may be at, over both links; which paths is for others to say.
  inNamespace(namespace, ['ip', 'mptcp', 'limits', 'set', 'subflow', '8', 'add_addr_accepted', '8']),
];

/** Once its radio link is made: into the LAN where the device starts. */
export const planArrival = (device: LabDevice): Command[] => [
  inNamespace(device.namespace, ['ip', 'link', 'set', 'dev', radioDevice, 'address', device.mac]),
  attach(device, device.at),
  ...planAddress(device, device.at),
];

/** Once its cellular link is made. */
export function planCellular({ namespace, cellular }: LabDevice): Command[] {
  if (!cellular) return [];
  const { wire, address, gateway } = cellular;
  const [, far] = wire.ends;
  const ip = (...args: string[]): Command => inNamespace(namespace, ['ip', ...args]);
  const out = ['default', 'via', gateway, 'dev', cellularDevice];
  return [
    inNamespace(far.namespace, ['ip', 'address', 'add', `${gateway}/30`, 'dev', far.device]),
    ip('address', 'add', `${address}/30`, 'dev', cellularDevice),
    ip('route', 'add', ...out, 'metric', cellularMetric),
    ip('rule', 'add', 'from', address, 'table', cellularTable),
    ip('route', 'add', ...out, 'table', cellularTable),
  ];
}

/** The device leaves the LAN: it hears nothing, and is heard no more. */
export const planLeave = (device: LabDevice, from: Site): Command[] => [
  inNamespace(from.namespace, ['ip', 'link', 'set', 'dev', accessPoint(device.name), 'nomaster', 'down']),
  inNamespace(device.namespace, ['ip', 'link', 'set', 'dev', radioDevice, 'down']),
  inNamespace(device.namespace, ['ip', 'address', 'flush', 'dev', radioDevice]),
];

/** The device enters a LAN; its address there is another matter (`planAddress`). */
export function planEnter(
  device: LabDevice,
  { from, to, radio, emulator }: { from: Site; to: Site; radio: WireSettings; emulator: Emulator },
): Command[] {
  const name = accessPoint(device.name);
  const far = { namespace: to.namespace, device: name };
  const move: Command = ['ip', 'link', 'set', 'dev', name, 'netns', to.namespace];
  return [
    ...(from === to ? [] : [inNamespace(from.namespace, move), ...planShape([far], radio, emulator)]),
    attach(device, to),
    inNamespace(device.namespace, ['ip', 'link', 'set', 'dev', radioDevice, 'up']),
  ];
}

/** What a DHCP client of the device would come to. */
export function planAddress(device: LabDevice, { gateway, ...site }: Site): Command[] {
  const address = device.addressAt({ gateway, ...site });
  const ip = (...args: string[]): Command => inNamespace(device.namespace, ['ip', ...args]);
  return [
    ip('address', 'add', `${address}/24`, 'dev', radioDevice),
    ip('route', 'add', 'default', 'via', gateway, 'dev', radioDevice, 'metric', radioMetric),
  ];
}

const attach = ({ name }: LabDevice, { namespace }: Site): Command =>
  inNamespace(namespace, ['ip', 'link', 'set', 'dev', accessPoint(name), 'master', lanBridge, 'up']);
