/** What an engine did, counted as it goes. The model's names; both agents add to one of these each. */
import type { EngineStatistics } from '../../model/migration.ts';

export const noStatistics = (): EngineStatistics => ({
  pages: { zero: 0, literal: 0, set: 0, copy: 0, delta: 0, unchanged: 0 },
  guestBytes: 0,
  wireBytes: 0,
  repairedPages: 0,
  requestedPages: 0,
  postcopyPages: 0,
  cpuMs: { digest: 0, lookup: 0, encode: 0, compress: 0, read: 0 },
});
