/** The memory of a VM that has left and stands still goes from its QEMU into the store of what stays behind. */
import { setTimeout as sleep } from 'node:timers/promises';
import type { GuestRam } from '../../migration/index.ts';
import type { Uuid } from '../../model/ids.ts';
import { blockBytes } from '../../pages/index.ts';
import type { KeptMemory } from './kept-memory.ts';

const pagesAtOnce = 256;
const timeoutMs = 120_000;
/** The guest has just begun elsewhere. Where both cloudlets share a machine, as in a lab, it goes first. */
const headStartMs = 500;

/** Throws `insufficient_space` when the quota cannot take it; then nothing of it is kept. */
export async function keepMemory(kept: KeptMemory, vmId: Uuid, ram: GuestRam): Promise<void> {
  const table = ram.table();
  ram.use(table);
  await using keeping = await kept.keep(vmId, table.pages);
  if (!keeping) return;
  await sleep(headStartMs);
  const buffer = Buffer.allocUnsafeSlow(pagesAtOnce * blockBytes);
  for (const { firstPage, pages } of table.blocks) {
    for (let done = 0; done < pages; done += pagesAtOnce) {
      const count = Math.min(pagesAtOnce, pages - done);
      ram.read(firstPage + done, count, buffer);
      await keeping.write(
        Uint32Array.from({ length: count }, (_, index) => firstPage + done + index),
        buffer.subarray(0, count * blockBytes),
      );
    }
  }
  await keeping.finish(AbortSignal.timeout(timeoutMs));
}
