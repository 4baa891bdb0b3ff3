/** Which engine carries a VM, when that is left to us. Pure. */
import type { MigrationEngine } from '../model/migration.ts';

/** Above this a QEMU that sends everything is done sooner than one core has the digests of it. */
const fastLinkBps = 2_000_000_000;

/** A destination that takes so many times less than can leave is one that holds the source up, replicas counted in. */
const slowShare = 4;

export interface EngineChoice {
  engine: MigrationEngine;
  /** For people. */
  reason: string;
}

/** `linkBps`: as measured in an earlier migration to the same peer, if there was one. */
export function chooseEngine(facts: {
  wanted: MigrationEngine | 'auto';
  channels: number;
  linkBps: number | undefined;
  limitBps: number | undefined;
  /** The best rate that was seen leave this cloudlet; missing where nothing is to be relayed. */
  uplinkBps?: number | undefined;
}): EngineChoice {
  const { wanted, channels, linkBps, limitBps, uplinkBps = 0 } = facts;
  if (wanted !== 'auto') return { engine: wanted, reason: 'asked for' };
  if (channels > 0) return { engine: 'direct', reason: `${channels} channels are QEMU's own` };
  const rateBps = Math.min(linkBps ?? Number.POSITIVE_INFINITY, limitBps ?? Number.POSITIVE_INFINITY);
  if (rateBps === Number.POSITIVE_INFINITY)
    return { engine: 'condensed', reason: 'nobody knows yet how fast the link is' };
  const isBottleneck =
    linkBps !== undefined && Math.min(uplinkBps, limitBps ?? uplinkBps) > linkBps * slowShare;
  if (isBottleneck) {
    const [to, from] = [linkBps, uplinkBps].map((bps) => Math.round(bps / 1e6));
    return {
      engine: 'relayed',
      reason: `the destination takes ${to} of ${from} Mbit/s: relays hold the rest`,
    };
  }
  const rate = `the link carries ${Math.round(rateBps / 1e6)} Mbit/s`;
  return rateBps >= fastLinkBps
    ? { engine: 'direct', reason: `${rate}: sending all of it is sooner done` }
    : { engine: 'condensed', reason: `${rate}: sending less is sooner done` };
}
