/**
 * The thesis's service initiation time at this cloudlet: what a fresh VM takes from the request until it serves, as far
 * as a cloudlet can know it: the creation of its latest VMs, and the boot of its golden snapshots.
 */
import type { Store } from '../store/index.ts';

/** Boot of a common server image, as long as no golden snapshot says what it takes here. */
const assumedBootMs = 20_000;

/** In ms; undefined as long as no VM was ever created here. */
export function serviceInitiationMs(store: Pick<Store, 'operations' | 'snapshots'>): number | undefined {
  const created = store.operations
    .latestSucceeded('vm.create', 20)
    .map(({ createdAt, finishedAt }) => Date.parse(finishedAt ?? createdAt) - Date.parse(createdAt));
  if (created.length === 0) return undefined;
  const boots = store.snapshots.list({ limit: 20 }).items.map(({ bootMs }) => bootMs);
  return median(created) + (boots.length > 0 ? median(boots) : assumedBootMs);
}

const median = (values: number[]): number =>
  values.toSorted((a, b) => a - b)[Math.floor(values.length / 2)] ?? 0;
