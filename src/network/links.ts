/** The network devices of the host, as `ip -j -d link` tells them. */
import { AppError } from '../model/errors.ts';
import type { Command } from './commands.ts';

export interface Link {
  name: string;
  /** `tun` for taps, `bridge`, `veth` and so on; absent for real hardware. */
  kind?: string;
  mtu: number;
  mac?: string;
  /** The bridge that it is plugged into. */
  master?: string;
  /** Free text that its maker left on it. */
  alias?: string;
}

export const listLinksCommand: Command = ['ip', '-j', '-d', 'link', 'show'];

/** Parses the output of `listLinksCommand`. Throws `unsupported` for output that no known `ip` gives. */
export function parseLinks(output: string): Link[] {
  let entries: unknown;
  try {
    // Without any device, some versions print nothing at all.
    entries = JSON.parse(output.trim() || '[]');
  } catch (error) {
    throw unknownOutput(output, error);
  }
  if (!Array.isArray(entries)) throw unknownOutput(output);
  // `-d` leaves empty objects where a filter hid a device.
  return entries.filter((entry) => isObject(entry) && Object.keys(entry).length > 0).map(parseLink);
}

function parseLink(entry: Record<string, unknown>): Link {
  const { ifname, mtu, address, master, ifalias, linkinfo } = entry;
  if (typeof ifname !== 'string' || typeof mtu !== 'number') throw unknownOutput(JSON.stringify(entry));
  const link: Link = { name: ifname, mtu };
  const kind = isObject(linkinfo) ? linkinfo.info_kind : undefined;
  if (typeof kind === 'string') link.kind = kind;
  if (typeof address === 'string') link.mac = address;
  if (typeof master === 'string') link.master = master;
  if (typeof ifalias === 'string') link.alias = ifalias;
  return link;
}

const isObject = (value: unknown): value is Record<string, unknown> =>
  typeof value === 'object' && value !== null && !Array.isArray(value);

const unknownOutput = (output: string, cause?: unknown): AppError =>
  new AppError(
    'unsupported',
    `List network devices: ip printed '${output.slice(0, 200)}', wanted JSON of its devices`,
    { missing: 'iproute2 with JSON output' },
    { cause },
  );
