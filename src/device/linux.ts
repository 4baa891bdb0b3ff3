/** The companion's view of a Linux device: its links, and round trips by the handshake of TCP. */
import { execFile } from 'node:child_process';
import { once } from 'node:events';
import { connect } from 'node:net';
import { networkInterfaces } from 'node:os';
import { promisify } from 'node:util';
import type { Run } from '../network/index.ts';
import type { Attachment } from './companion.ts';

export interface Links {
  /** The device of the radio; the first one with an IPv4 address if absent. */
  radio?: string | undefined;
  cellular?: string | undefined;
}

/** What the device is attached to, by its interfaces as `os.networkInterfaces` gives them. */
export function attachmentOf(
  { radio, cellular }: Links,
  interfaces: ReturnType<typeof networkInterfaces> = networkInterfaces(),
): Attachment {
  const links = Object.entries(interfaces).flatMap(([device, addresses = []]) =>
    addresses
      .filter(({ family, internal }) => family === 'IPv4' && !internal)
      .map(({ address, mac }) => ({ device, address, mac })),
  );
  const isRadio = ({ device }: { device: string }): boolean =>
    radio === undefined ? device !== cellular : device === radio;
  const found = links.find(isRadio);
  const others = links.filter(({ device }) => device === cellular);
  const used = [...(found ? [found] : []), ...others];
  return {
    ...(found ? { radio: { device: found.device, address: found.address } } : {}),
    addresses: used.map(({ address }) => address),
    macs: [...new Set(used.map(({ mac }) => mac).filter((mac) => mac !== '00:00:00:00:00:00'))],
  };
}

/** A handshake takes one round trip, whatever the daemon is busy with: its kernel answers. */
export async function measureByHandshake(url: string, signal: AbortSignal): Promise<number | undefined> {
  const { hostname, port } = new URL(url);
  const host = hostname.replace(/^\[|\]$/g, '');
  const begun = performance.now();
  const socket = connect({ host, port: Number(port || 443) });
  try {
    await once(socket, 'connect', { signal });
    return performance.now() - begun;
  } catch {
    return undefined;
  } finally {
    socket.on('error', () => {});
    socket.destroy();
  }
}

/** Longer ago, a round trip says nothing about now. */
const recentMs = 5000;

/** The shortest round trip that the kernel has of connections to the address that something came over of late. */
export async function measureConnections(
  address: string,
  signal: AbortSignal,
  run: Run = runProgram,
): Promise<number | undefined> {
  const { stdout } = await run('ss', ['-tniOH', 'state', 'established', 'dst', address], { signal });
  const rtts = stdout.split('\n').flatMap((line) => {
    const rttMs = Number(/ rtt:([\d.]+)\//.exec(line)?.[1] ?? Number.NaN);
    const heardMs = Number(/ lastrcv:(\d+)/.exec(line)?.[1] ?? 0);
    return rttMs > 0 && heardMs <= recentMs ? [rttMs] : [];
  });
  return rtts.length === 0 ? undefined : Math.min(...rtts);
}

export const runProgram: Run = async (program, args, { signal }) =>
  promisify(execFile)(program, [...args], { signal, timeout: 10_000, maxBuffer: 4_000_000 });
