/** What went by way of relays, of memory and of a disk together. */
import type { DivisionStatistics, MergeStatistics } from '../../model/migration.ts';

export function sumOfDivisions(a: DivisionStatistics, b: DivisionStatistics): DivisionStatistics {
  const relays = a.relays.map((each) => ({ ...each }));
  for (const other of b.relays) {
    const same = relays.find(({ name }) => name === other.name);
    if (!same) relays.push({ ...other });
    else {
      same.slabs += other.slabs;
      same.bytes += other.bytes;
    }
  }
  return {
    ...a,
    slabs: a.slabs + b.slabs,
    zeroPages: a.zeroPages + b.zeroPages,
    alikePages: a.alikePages + b.alikePages,
    relays,
  };
}

/** How long a guest waited for its memory is not how long it did for its disk. */
export const sumOfMerges = (memory: MergeStatistics, disk: MergeStatistics): MergeStatistics => ({
  ...memory,
  slabs: memory.slabs + disk.slabs,
  bytes: memory.bytes + disk.bytes,
  wrong: memory.wrong + disk.wrong,
  refetched: memory.refetched + disk.refetched,
});
