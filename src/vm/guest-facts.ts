/** What a guest says of itself through its agent: parsed from replies that may be anything, and bounded. */
import { isObject } from '../qmp/index.ts';

export interface GuestInterface {
  name: string;
  mac?: string;
  addresses: { address: string; prefixLength: number }[];
}

export interface GuestFacts {
  hostname?: string;
  os?: { id?: string; name?: string; version?: string };
  kernel?: string;
  interfaces?: GuestInterface[];
}

const maxItems = 64;
const maxTextLength = 255;

const text = (value: unknown): string | undefined =>
  typeof value === 'string' && value !== '' ? value.slice(0, maxTextLength) : undefined;

/** The return of guest-get-osinfo. */
export function parseOs(value: unknown): Pick<GuestFacts, 'os' | 'kernel'> {
  if (!isObject(value)) return {};
  const [id, name, version] = [
    text(value.id),
    text(value['pretty-name']) ?? text(value.name),
    text(value.version),
  ];
  const kernel = text(value['kernel-release']);
  const os = { ...(id && { id }), ...(name && { name }), ...(version && { version }) };
  return { ...(Object.keys(os).length > 0 && { os }), ...(kernel && { kernel }) };
}

/** The return of guest-network-get-interfaces; items that make no sense are left out. */
export function parseInterfaces(value: unknown): GuestInterface[] | undefined {
  if (!Array.isArray(value)) return undefined;
  return value.slice(0, maxItems).flatMap((item: unknown) => {
    const name = isObject(item) ? text(item.name) : undefined;
    if (!isObject(item) || name === undefined) return [];
    const mac = text(item['hardware-address']);
    return [
      { name, ...(mac && { mac: mac.toLowerCase() }), addresses: parseAddresses(item['ip-addresses']) },
    ];
  });
}

function parseAddresses(value: unknown): GuestInterface['addresses'] {
  if (!Array.isArray(value)) return [];
  return value.slice(0, maxItems).flatMap((item: unknown) => {
    const address = isObject(item) ? text(item['ip-address']) : undefined;
    if (!isObject(item) || address === undefined || !Number.isInteger(item.prefix)) return [];
    return [{ address, prefixLength: item.prefix as number }];
  });
}
