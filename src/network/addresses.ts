/**
 * Which address a VM gets in a network whose addresses the cloudlet gives out (IPv4). Pure: who holds what is the
 * caller's to know. Two schemes: the lowest free address of a range, or the thesis's, where devices have even
 * addresses and a device's VM the next odd one, so that both sides know it without being told (section 3.2.1.1).
 */
import { isIPv4 } from 'node:net';
import { AppError } from '../model/errors.ts';

export interface AddressPlan {
  /** `10.4.0.0/24` */
  subnet: string;
  gateway: string;
  /** The first and the last address for VMs, both included. */
  from: string;
  to: string;
  /** `lowest` if absent. */
  scheme?: 'lowest' | 'parity';
}

export interface AddressWish {
  /** Held by others, or known to be in use. */
  taken: ReadonlySet<string>;
  /** Of the VM's device in this network; what `parity` goes by. */
  device?: string;
}

/** The plan as it is. Throws `invalid_request` that names each field which does not fit. */
export function requireAddressPlan(plan: AddressPlan): AddressPlan {
  const problems = [...problemsOf(plan)];
  const first = problems[0];
  if (!first) return plan;
  throw new AppError(
    'invalid_request',
    `Addresses of a network: ${first.field} is '${first.value}', wanted ${first.wanted}`,
    { problems },
  );
}

function* problemsOf({
  subnet,
  gateway,
  from,
  to,
}: AddressPlan): Generator<{ field: string; value: string; wanted: string }> {
  const net = parseSubnet(subnet);
  if (!net) {
    yield { field: 'subnet', value: subnet, wanted: 'NETWORK/PREFIX such as 10.4.0.0/24' };
    return;
  }
  const within = `an address in ${subnet} other than its first and last`;
  for (const [field, value] of Object.entries({ gateway, from, to }))
    if (!isHost(net, value)) yield { field, value, wanted: within };
  if (isIPv4(from) && isIPv4(to) && toNumber(from) > toNumber(to))
    yield { field: 'to', value: to, wanted: `an address from ${from} on` };
}

/** A free address with the subnet's prefix length. Throws `no_free_address` that names the network and its range. */
export function chooseAddress(network: string, plan: AddressPlan, { taken, device }: AddressWish): string {
  const { prefix } = parseSubnet(plan.subnet)!;
  const isFree = (address: string) => address !== plan.gateway && !taken.has(address);
  if (plan.scheme === 'parity' && device !== undefined) {
    const address = nextOdd(plan, device);
    if (address !== undefined && isFree(address)) return `${address}/${prefix}`;
    throw noFreeAddress(network, plan, `the next odd address after the device's ${device}`);
  }
  for (let number = toNumber(plan.from); number <= toNumber(plan.to); number += 1) {
    const address = fromNumber(number);
    if (isFree(address)) return `${address}/${prefix}`;
  }
  throw noFreeAddress(network, plan, `${plan.from} to ${plan.to}`);
}

function nextOdd({ subnet }: AddressPlan, device: string): string | undefined {
  const net = parseSubnet(subnet)!;
  if (!isHost(net, device) || toNumber(device) % 2 !== 0) return undefined;
  const address = fromNumber(toNumber(device) + 1);
  return isHost(net, address) ? address : undefined;
}

function noFreeAddress(network: string, { subnet }: AddressPlan, range: string): AppError {
  return new AppError(
    'no_free_address',
    `Reserve an address in network ${network} (${subnet}): wanted ${range}, all of it is taken`,
    { network, subnet, range },
  );
}

interface Subnet {
  first: number;
  last: number;
  prefix: number;
}

function parseSubnet(text: string): Subnet | undefined {
  const [network = '', length = ''] = text.split('/');
  if (text !== `${network}/${length}` || !isIPv4(network) || !/^\d{1,2}$/.test(length)) return undefined;
  const prefix = Number(length);
  const size = 2 ** (32 - prefix);
  const first = toNumber(network);
  return prefix >= 8 && prefix <= 30 && first % size === 0
    ? { first, last: first + size - 1, prefix }
    : undefined;
}

const isHost = ({ first, last }: Subnet, address: string): boolean =>
  isIPv4(address) && toNumber(address) > first && toNumber(address) < last;

/** Whether the address lies in the subnet. */
export function isInSubnet(subnet: string, address: string): boolean {
  const net = parseSubnet(subnet);
  return (
    net !== undefined && isIPv4(address) && toNumber(address) >= net.first && toNumber(address) <= net.last
  );
}

const toNumber = (address: string): number =>
  address.split('.').reduce((sum, part) => sum * 256 + Number(part), 0);
const fromNumber = (number: number): string =>
  [24, 16, 8, 0].map((shift) => Math.floor(number / 2 ** shift) % 256).join('.');
