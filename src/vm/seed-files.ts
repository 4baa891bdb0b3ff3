/**
 * What stands on a guest's first-boot disk, as text and without I/O. cloud-init reads `meta-data`, `user-data` and
 * `network-config`; a guest without it sources `viper.env` in its shell. Nothing that is written here can end the
 * quotes or the line that it stands in. Formats: cloud-init's documentation, "NoCloud" and "Network config version
 * 2". cloud-init reads YAML, and JSON is YAML.
 */
import { isIP } from 'node:net';
import { AppError } from '../model/errors.ts';
import { macPattern, namePattern } from '../model/ids.ts';
import type { SeedSpec } from '../model/vm.ts';

export interface SeedFacts {
  spec: SeedSpec;
  /** Another one makes cloud-init take the guest for a new machine, as a clone is. */
  instanceId: string;
  /** MACs of all interfaces of the VM; those without an address in `spec` ask by DHCP, unless they wait. */
  macs?: readonly string[];
}

interface Problem {
  field: string;
  value: unknown;
  wanted: string;
}

const macAddress = new RegExp(macPattern);
const hostName = new RegExp(namePattern);
const instanceName = /^[A-Za-z0-9._-]{1,128}$/;

/** The files by name. Throws `invalid_request` that lists each field which cannot be written safely. */
export function seedFiles(facts: SeedFacts): Record<string, string> {
  const problems = findProblems(facts);
  const first = problems[0];
  if (first)
    throw new AppError(
      'invalid_request',
      `Create seed: ${first.field} is ${JSON.stringify(first.value)}, wanted ${first.wanted}`,
      { problems },
    );
  const { spec, instanceId } = facts;
  const network = networkConfig(facts);
  return {
    'meta-data': toYaml({ 'instance-id': instanceId, 'local-hostname': spec.hostname }),
    'user-data': spec.userData ?? `#cloud-config\n${toYaml(userData(spec))}`,
    ...(network ? { 'network-config': toYaml(network) } : {}),
    'viper.env': viperEnv(spec, instanceId),
  };
}

function userData({ hostname, sshKeys }: SeedSpec) {
  return {
    hostname,
    users: ['default'],
    ...(sshKeys.length > 0 ? { ssh_authorized_keys: sshKeys } : {}),
  };
}

/** Nothing when nothing is known of the interfaces: cloud-init then asks by DHCP on the first that it finds. */
function networkConfig({ spec, macs = [] }: SeedFacts) {
  const all = [...new Set([...macs, ...spec.addresses.map(({ mac }) => mac)])];
  if (all.length === 0) return undefined;
  const ethernets = all.map((mac, index) => {
    const own = spec.addresses.filter((address) => address.mac === mac);
    const isWaiting = spec.waiting?.includes(mac) ?? false;
    const setting = own.length === 0 ? { dhcp4: !isWaiting } : staticSetting(own);
    return [`nic${index}`, { match: { macaddress: mac }, ...setting }];
  });
  return { version: 2, ethernets: Object.fromEntries(ethernets) };
}

function staticSetting(addresses: SeedSpec['addresses']) {
  const gateways = addresses.flatMap(({ gateway }) => gateway ?? []);
  // Spelled as prefixes: `default` and `gateway4` are each missing in some release that is in use.
  const routes = gateways.map((via) => ({ to: isIP(via) === 6 ? '::/0' : '0.0.0.0/0', via }));
  return {
    dhcp4: false,
    addresses: addresses.map(({ address }) => address),
    ...(routes.length > 0 ? { routes } : {}),
  };
}

function viperEnv({ hostname, sshKeys, addresses, waiting = [] }: SeedSpec, instanceId: string): string {
  const places = addresses.map(
    ({ mac, address, gateway }) => `${mac}=${address}${gateway ? `,${gateway}` : ''}`,
  );
  const values = {
    VIPER_HOSTNAME: hostname,
    VIPER_INSTANCE_ID: instanceId,
    VIPER_SSH_KEYS: sshKeys.join('\n'),
    VIPER_ADDRESSES: places.join(' '),
    VIPER_WAITING: waiting.join(' '),
  };
  return Object.entries(values)
    .map(([key, value]) => `${key}=${shellQuote(value)}\n`)
    .join('');
}

/** POSIX shell: inside single quotes only the quote itself means anything. */
const shellQuote = (value: string): string => `'${value.replaceAll("'", "'\\''")}'`;

const toYaml = (value: unknown): string => `${JSON.stringify(value, null, 2)}\n`;

function findProblems({ spec, instanceId, macs = [] }: SeedFacts): Problem[] {
  const problems: Problem[] = [];
  const want = (good: boolean, field: string, value: unknown, wanted: string) => {
    if (!good) problems.push({ field, value, wanted });
  };
  want(hostName.test(spec.hostname), 'seed.hostname', spec.hostname, 'a host name label');
  want(instanceName.test(instanceId), 'instanceId', instanceId, 'letters, digits, dots and hyphens');
  for (const [i, key] of spec.sshKeys.entries())
    want(isOnePrintableLine(key), `seed.sshKeys/${i}`, key, 'one line of printable characters');
  for (const [i, mac] of macs.entries()) want(macAddress.test(mac), `macs/${i}`, mac, 'a MAC address');
  for (const [i, mac] of (spec.waiting ?? []).entries())
    want(macAddress.test(mac), `seed.waiting/${i}`, mac, 'a MAC address in lower case');
  for (const [i, { mac, address, gateway }] of spec.addresses.entries()) {
    const field = `seed.addresses/${i}`;
    want(macAddress.test(mac), `${field}/mac`, mac, 'a MAC address in lower case');
    want(isAddressWithPrefix(address), `${field}/address`, address, 'address/prefix length');
    if (gateway !== undefined)
      want(
        isIP(gateway) !== 0 && isIP(gateway) === isIP(address.split('/')[0] ?? ''),
        `${field}/gateway`,
        gateway,
        'an address of the same family as the address',
      );
  }
  return problems;
}

/** Without control characters, and without what YAML takes for a line end or refuses. */
const isOnePrintableLine = (text: string): boolean =>
  text.trim() !== '' && text.isWellFormed() && !/[\p{Cc}\u2028\u2029\ufeff\ufffe\uffff]/u.test(text);

function isAddressWithPrefix(text: string): boolean {
  const [address = '', prefix = '', ...rest] = text.split('/');
  const family = isIP(address);
  if (family === 0 || address.includes('%') || rest.length > 0 || !/^\d{1,3}$/.test(prefix)) return false;
  return Number(prefix) <= (family === 4 ? 32 : 128);
}
