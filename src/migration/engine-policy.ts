/** Which engine carries a VM, and in which mode, when that is left to us, and why. Pure. */
import type { MigrationEngine, MigrationMode } from '../model/migration.ts';
import type { SetName } from '../pages/index.ts';

/** Above this a QEMU that sends everything is done sooner than one core has looked at all of it. */
const fastLinkBps = 2_000_000_000;
/** The first QEMU that tells where the VM's memory lies: without that there are no references, and no post-copy of ours. */
const readableSinceMajor = 8;

/** A destination that takes so many times less than can leave is one that holds the source up. */
const slowShare = 2;

export interface EngineChoice {
  engine: MigrationEngine;
  mode: MigrationMode;
  /** For people. */
  reason: string;
}

export interface EngineFacts {
  wanted: MigrationEngine | 'auto';
  /** Missing where it is left to us. */
  mode: MigrationMode | undefined;
  /** The destination's host lets QEMU fetch pages when the guest asks for them. */
  canPostcopy: boolean;
  channels: number;
  /** As measured in an earlier migration to the same peer, if there was one. */
  linkBps: number | undefined;
  limitBps: number | undefined;
  /** Of the source. */
  qemuVersion: string;
  /** What both cloudlets hold of the VM. */
  sets: readonly SetName[];
  /** The best rate that was seen leave this cloudlet; missing where nothing is to be relayed. */
  uplinkBps?: number | undefined;
}

export function chooseEngine(facts: EngineFacts): EngineChoice {
  const isReadable = Number.parseInt(facts.qemuVersion, 10) >= readableSinceMajor;
  const { engine, reason } = choose(facts, isReadable);
  const canPostcopy = isReadable && facts.canPostcopy && facts.channels === 0;
  return { engine, reason, mode: facts.mode ?? modeFor(engine, canPostcopy) };
}

/** QEMU cannot take back a post-copy of its own once that has begun: `direct` has one only for those who ask for it. */
export function modeFor(engine: MigrationEngine, canPostcopy: boolean): MigrationMode {
  if (engine === 'relayed') return 'postcopy';
  return engine === 'condensed' && canPostcopy ? 'auto' : 'precopy';
}

function choose(facts: EngineFacts, isReadable: boolean): Omit<EngineChoice, 'mode'> {
  const { wanted, mode = 'precopy', channels, linkBps, limitBps, qemuVersion, sets, uplinkBps = 0 } = facts;
  if (wanted !== 'auto') return { engine: wanted, reason: 'asked for' };
  if (channels > 0) return { engine: 'direct', reason: `${channels} channels are QEMU's own` };
  if (!isReadable && mode !== 'precopy')
    return {
      engine: 'direct',
      reason: `QEMU ${qemuVersion} does not tell where the memory of the VM lies: post-copy is its own`,
    };
  const rateBps = Math.min(linkBps ?? Number.POSITIVE_INFINITY, limitBps ?? Number.POSITIVE_INFINITY);
  const isBottleneck =
    linkBps !== undefined && Math.min(uplinkBps, limitBps ?? uplinkBps) > linkBps * slowShare;
  if (isBottleneck) {
    const [to, from] = [linkBps, uplinkBps].map((bps) => Math.round(bps / 1e6));
    return {
      engine: 'relayed',
      reason: `the destination takes ${to} of ${from} Mbit/s: relays hold the rest`,
    };
  }
  const isUnknown = rateBps === Number.POSITIVE_INFINITY;
  const rate = isUnknown
    ? 'nobody knows yet how fast the link is'
    : `the link carries ${Math.round(rateBps / 1e6)} Mbit/s`;
  if (!isUnknown && rateBps >= fastLinkBps)
    return { engine: 'direct', reason: `${rate}: sending all of it is sooner done` };
  return {
    engine: 'condensed',
    reason: `${rate}: sending less is sooner done; ${tell(isReadable ? sets : [])}`,
  };
}

const kinds: Record<string, string> = {
  image: 'the base image',
  golden: 'memory of a golden snapshot',
  stayed: 'memory that stayed behind',
  disk: 'the disk on shared storage',
};

function tell(sets: readonly SetName[]): string {
  const found = sets
    .map((name) => kinds[name.slice(0, name.indexOf(':'))])
    .filter((kind) => kind !== undefined);
  if (found.length === 0) return 'both sides hold nothing of it';
  return `both sides hold ${[...new Set(found)].join(', ')}`;
}
