/** What an engine did, counted as it goes. The model's names; both agents add to one of these each. */
import type { EngineStatistics } from '../../model/migration.ts';

/** Of memory and disk together: a block of the disk counts as a page. */
export function sumOf(a: EngineStatistics, b: EngineStatistics): EngineStatistics {
  const sum = noStatistics();
  for (const each of [a, b]) {
    for (const kind of Object.keys(sum.pages) as (keyof EngineStatistics['pages'])[])
      sum.pages[kind] += each.pages[kind];
    for (const stage of Object.keys(sum.cpuMs) as (keyof EngineStatistics['cpuMs'])[])
      sum.cpuMs[stage] += each.cpuMs[stage];
    sum.guestBytes += each.guestBytes;
    sum.wireBytes += each.wireBytes;
    sum.repairedPages += each.repairedPages;
    sum.requestedPages += each.requestedPages;
    sum.postcopyPages += each.postcopyPages;
  }
  const fallback = a.fallback ?? b.fallback;
  return fallback === undefined ? sum : { ...sum, fallback };
}

export const noStatistics = (): EngineStatistics => ({
  pages: { zero: 0, literal: 0, set: 0, copy: 0, delta: 0, unchanged: 0 },
  guestBytes: 0,
  wireBytes: 0,
  repairedPages: 0,
  requestedPages: 0,
  postcopyPages: 0,
  cpuMs: { digest: 0, lookup: 0, encode: 0, compress: 0, read: 0 },
});
