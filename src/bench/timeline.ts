/** What daemons logged about a migration, told by `VIPER_LOG=debug`: where time goes. */
import { readFile } from 'node:fs/promises';
import path from 'node:path';
import type { LabCloudlet } from '../lab/fleet.ts';

export interface Step {
  atMs: number;
  what: string;
}

/** By ms from `beganMs`, a time of the clock. */
export async function timelineOf(
  cloudlets: readonly Pick<LabCloudlet, 'name' | 'directory'>[],
  migration: string,
  beganMs: number,
): Promise<Step[]> {
  const steps: Step[] = [];
  for (const { name, directory } of cloudlets) {
    const lines = (await readFile(path.join(directory, 'daemon.log'), 'utf8')).split('\n');
    for (const line of lines) {
      if (!line.includes(migration)) continue;
      const { time, state, msg, step, round, remainingBytes, changesPerSecond, migrationId } =
        JSON.parse(line);
      if (migrationId !== migration || (state === undefined && step === undefined)) continue;
      const atMs = Math.round((typeof time === 'number' ? time : Date.parse(time)) - beganMs);
      const what = step === 'round' ? `round ${round}: ${remainingBytes} bytes, ${changesPerSecond}/s` : step;
      steps.push({ atMs, what: `${name} ${what ?? state ?? msg}` });
    }
  }
  return steps.toSorted((a, b) => a.atMs - b.atMs);
}
