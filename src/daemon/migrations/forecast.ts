/**
 * What a migration would cost, from what can be known before it: the rate at which the guest dirties its memory is
 * measured now, the rate of the link is what the last migration to that peer came to.
 */
import type { Static } from 'typebox';
import type * as schemas from '../../contract/schemas.ts';
import { estimate } from '../../migration/estimator.ts';
import type { MigrationOptions, VmToMove } from '../../model/migration.ts';
import { MiB } from '../../model/units.ts';
import { delay, type QmpConnection } from '../../qmp/index.ts';
import type { MigrationRecord } from './record.ts';

export type Forecast = NonNullable<Static<typeof schemas.MigrationPlan>['forecast']>;

/** Where nothing was ever sent to that peer: a common local network. */
export const assumedBps = 1_000_000_000;
const measureS = 1;
const measureTimeoutMs = 5000;
/** Eight times QEMU's default, which finds nothing in a small guest; 16 MiB of each GiB are hashed. */
const samplesPerGiB = 4096;

export interface ForecastInput {
  vm: VmToMove;
  options: MigrationOptions;
  dirtyBps: number;
  /** Of an earlier migration to the same peer. */
  linkBps: number | undefined;
  rttMs: number;
  sendsImage: boolean;
}

export function forecast({ vm, options, dirtyBps, linkBps, rttMs, sendsImage }: ForecastInput): Forecast {
  const { mode, limits } = options;
  const bandwidthBps = Math.min(limits.bandwidthBps ?? Number.POSITIVE_INFINITY, linkBps ?? assumedBps);
  const { totalMs, downtimeMs, bytes, converges, input } = estimate({
    mode,
    memoryBytes: vm.spec.memoryBytes,
    zeroBytes: 0,
    diskBytes: options.storage === 'shared' ? 0 : vm.diskBytes + (sendsImage ? vm.image.fileBytes : 0),
    dirtyBps,
    bandwidthBps,
    rttMs,
    downtimeLimitMs: limits.downtimeMs,
  });
  const inputs = Object.fromEntries(
    Object.entries(input).filter((entry): entry is [string, number] => typeof entry[1] === 'number'),
  );
  return { totalMs, downtimeMs, bytes, converges, inputs };
}

/** QEMU measures one thing at a time: who asks meanwhile gets the same answer. */
const measuring = new WeakMap<QmpConnection, Promise<number>>();

/** By QEMU's sampling of pages, which costs the guest next to nothing. 0 for one that stands still. */
export function measureDirtyBps(qmp: QmpConnection): Promise<number> {
  const known = measuring.get(qmp);
  if (known) return known;
  const measured = sampleDirtyBps(qmp).finally(() => measuring.delete(qmp));
  measuring.set(qmp, measured);
  return measured;
}

async function sampleDirtyBps(qmp: QmpConnection): Promise<number> {
  const signal = AbortSignal.timeout(measureTimeoutMs);
  await qmp.execute('calc-dirty-rate', { 'calc-time': measureS, 'sample-pages': samplesPerGiB }, { signal });
  for (;;) {
    const { status, 'dirty-rate': rate } = await qmp.execute('query-dirty-rate', undefined, { signal });
    if (status === 'measured') return (rate ?? 0) * MiB * 8;
    await delay(50, signal);
  }
}

/**
 * The rate that the last migration to this peer came to, of those given from old to new. One that went condensed sent
 * little, so there it is the best rate that was seen on the link.
 */
export function linkBpsOf(records: readonly MigrationRecord[], peerId: string): number | undefined {
  const rateOf = ({ result, options }: MigrationRecord): number | undefined => {
    // What relays were given says nothing of the destination.
    if (options?.engine === 'relayed') return undefined;
    return options?.engine === 'condensed' ? result?.link?.rateBps : result?.rateBps;
  };
  const last = records.findLast(
    (record) => record.role === 'source' && record.peer.id === peerId && rateOf(record),
  );
  return last && rateOf(last);
}

/** The best rate that was seen leave this cloudlet, whatever it left for. */
export function uplinkBpsOf(records: readonly MigrationRecord[]): number | undefined {
  const rates = records
    .filter(({ role, result }) => role === 'source' && result)
    .map(({ result }) => Math.max(result!.link?.rateBps ?? 0, result!.rateBps));
  const best = Math.max(0, ...rates);
  return best > 0 ? best : undefined;
}
