/**
 * The possible-neighbour database (thesis, 3.4.4): what one cloudlet knows of the way to each peer. By unique
 * cloudlet id, since addresses change. A peer is a neighbour while its RTT is acceptable and it answers. Pure.
 */
import type { RttStats } from '../model/follow.ts';
import type { Uuid } from '../model/ids.ts';
import { noRtt, observeRtt } from './rtt.ts';

export interface Neighbour {
  cloudletId: Uuid;
  rtt: RttStats;
  /** What past transfers came to. */
  bandwidthBps?: number;
  /** Prefixes of its LANs, such as 10.4.0.0/24: a device with an address in one of them is there. */
  lans: readonly string[];
}

export interface NeighbourPolicy {
  /** RTT from which on a peer is no neighbour. */
  acceptableMs: number;
  /** A peer that has not answered for this long is no neighbour. */
  silentAfterMs: number;
}

export type Standing = 'neighbour' | 'far' | 'silent' | 'unknown';

export const newNeighbour = (cloudletId: Uuid): Neighbour => ({ cloudletId, rtt: noRtt, lans: [] });

/** After one round of probes to it. */
export function observeProbes(
  neighbour: Neighbour,
  samples: readonly (number | 'lost')[],
  atMs: number,
): Neighbour {
  return { ...neighbour, rtt: samples.reduce((rtt, each) => observeRtt(rtt, each, atMs), neighbour.rtt) };
}

/** After a transfer to it; `capBps` is the limit that it was given, if any. */
export function observeTransfer(neighbour: Neighbour, rateBps: number, capBps?: number): Neighbour {
  const before = neighbour.bandwidthBps;
  // A transfer that its own limit held back says only that the link is at least as fast.
  const held = capBps !== undefined && rateBps > capBps * 0.8;
  if (rateBps <= 0 || (held && before !== undefined && before > rateBps)) return neighbour;
  return { ...neighbour, bandwidthBps: before === undefined ? rateBps : before + (rateBps - before) / 4 };
}

export function standingOf({ rtt }: Neighbour, policy: NeighbourPolicy, nowMs: number): Standing {
  if (rtt.samples === 0) return 'unknown';
  if (nowMs - rtt.answeredAtMs > policy.silentAfterMs) return 'silent';
  return rtt.smoothedMs < policy.acceptableMs ? 'neighbour' : 'far';
}

/** Whether an address lies in a prefix; IPv4 only, other texts never match. */
export function isInPrefix(address: string, prefix: string): boolean {
  const [network = '', length = ''] = prefix.split('/');
  const [a, b, bits] = [asNumber(address), asNumber(network), Number(length)];
  if (a === undefined || b === undefined || !/^\d{1,2}$/.test(length) || bits > 32) return false;
  const size = 2 ** (32 - bits);
  return Math.floor(a / size) === Math.floor(b / size);
}

function asNumber(address: string): number | undefined {
  const parts = address.split('.');
  if (parts.length !== 4) return undefined;
  let value = 0;
  for (const part of parts) {
    if (!/^\d{1,3}$/.test(part) || Number(part) > 255) return undefined;
    value = value * 256 + Number(part);
  }
  return value;
}

/** In whose LAN an address is: of the longest prefix that it matches. */
export function ownerOfAddress(
  address: string,
  cloudlets: Iterable<{ cloudletId: Uuid; lans: readonly string[] }>,
): Uuid | undefined {
  let found: { cloudletId: Uuid; bits: number } | undefined;
  for (const { cloudletId, lans } of cloudlets) {
    for (const lan of lans) {
      const bits = Number(lan.split('/')[1]);
      if (isInPrefix(address, lan) && (found === undefined || bits > found.bits))
        found = { cloudletId, bits };
    }
  }
  return found?.cloudletId;
}
