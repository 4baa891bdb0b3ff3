/**
 * `npm run bench:migrate`: the same guest moved by plain QEMU over TCP and by Viper's direct engine, in turns, in one
 * run, so that other work on the machine meets both. Shared-nothing: first its disk, then its memory, on loopback.
 * Downtime is seen from outside, by a guest that writes to its serial console every 10 ms, and told by QEMU as well.
 * `ROUNDS` is the number of moves each (5); MEMORY_MIB and DISK_MIB say what is in the guest (1024, 512).
 */
import { formatBytes, MiB } from '../model/units.ts';
import { diskMiB, filledMiB, type Move, memoryBytes } from './moving-guest.ts';
import { plainWay } from './plain-move.ts';
import { median, table } from './report.ts';
import { viperWay } from './viper-move.ts';

const rounds = Number(process.env.ROUNDS ?? 5);

await using viper = await viperWay();
await viper.rest();
await using plain = await plainWay(viper.accelerator);
await plain.rest();

const ways = { plain, viper };
const moves: Record<keyof typeof ways, Move[]> = { plain: [], viper: [] };
for (let round = 0; round < rounds; round += 1) {
  for (const [name, way] of Object.entries(ways) as [keyof typeof ways, typeof plain][]) {
    await way.wake();
    moves[name].push(await way.move());
    await way.rest();
  }
}

const movedBytes = (move: Move): number => move.memoryBytes + diskMiB * MiB;
const perGB = (move: Move, cpuMs: number | undefined): number => ((cpuMs ?? 0) * 1e9) / movedBytes(move);
const row = (name: string, pick: (move: Move) => number): string[] => {
  const [a, b] = [moves.plain.map(pick), moves.viper.map(pick)];
  const ratio = median(b) / median(a);
  return [name, shown(a), shown(b), Number.isFinite(ratio) ? ratio.toFixed(2) : ''];
};
/** The median, and between what the values lie. */
const shown = (values: number[]): string =>
  `${median(values).toFixed(0)} (${Math.min(...values).toFixed(0)} to ${Math.max(...values).toFixed(0)})`;

console.log(
  `guest of ${formatBytes(memoryBytes)}, ${filledMiB} MiB of it filled, ${diskMiB} MiB on disk; ${rounds} moves each in turns: medians (span)\n`,
);
console.log(
  table(
    ['shared-nothing, loopback', 'plain QEMU', 'Viper direct', 'Viper / plain'],
    [
      row('memory, MB/s', (move) => move.memoryBytes / move.memoryMs / 1000),
      row('disk, MB/s', (move) => (diskMiB * MiB) / move.diskMs / 1000),
      row('from the request to the end, ms', (move) => move.totalMs),
      row('longest silence of the guest, ms', (move) => move.gapMs),
      row("downtime by QEMU's count, ms", (move) => move.qemuDowntimeMs),
      row('CPU of the source QEMU, ms per GB moved', (move) => perGB(move, move.cpuMs.source)),
      row('CPU of the destination QEMU', (move) => perGB(move, move.cpuMs.destination)),
      row("CPU of the source's daemon", (move) => perGB(move, move.cpuMs.sourceDaemon)),
      row("CPU of the destination's daemon", (move) => perGB(move, move.cpuMs.destinationDaemon)),
    ],
  ),
);
const { idle, most } = viper.residentBytes();
console.log(
  `\nresident memory of a daemon: idle with a peer ${Math.max(...idle.map((bytes) => bytes / 1e6)).toFixed(0)} MB, while a guest moves at most ${(most / 1e6).toFixed(0)} MB`,
);
