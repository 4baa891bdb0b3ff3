/**
 * What the guest has said on its serial console, as QEMU writes it to a file while nobody need be attached. The
 * file is bounded: QEMU opens it to append (`logappend=on`), so it may be shortened in place under QEMU's hands.
 */
import { open, stat } from 'node:fs/promises';
import { KiB, MiB } from '../model/units.ts';
import { machinePaths } from './paths.ts';
import { readTail } from './tail.ts';

const maxLogBytes = MiB;
const keptLogBytes = 512 * KiB;

/** At most the last `tailBytes` of the console; empty if the VM never ran. */
export function readConsoleLog(directory: string, tailBytes: number): Promise<Buffer> {
  return readTail(machinePaths(directory).consoleLog, tailBytes);
}

/**
 * Keeps the last half of a log that has grown too long. What the guest says in that very moment may be lost or
 * come before what is kept.
 */
export async function trimConsoleLog(directory: string): Promise<void> {
  const path = machinePaths(directory).consoleLog;
  const size = await stat(path).then(
    (stats) => stats.size,
    () => 0,
  );
  if (size <= maxLogBytes) return;
  const kept = await readTail(path, keptLogBytes);
  const file = await open(path, 'a');
  try {
    await file.truncate(0);
    await file.appendFile(kept);
  } finally {
    await file.close();
  }
}
