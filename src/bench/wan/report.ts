/** What the runs came to: a row for each cell and mover with medians, held against what was promised; CSV and figures. */
import { median, table } from '../report.ts';
import { barChart } from '../svg.ts';
import { type Cell, isStock, type Mover, moverNames, movers } from './grid.ts';
import type { Run } from './measured.ts';
import type { Minimum } from './minimum.ts';
import type { OverlayRun } from './overlay.ts';

interface Row {
  cell: Cell;
  mover: Mover;
  runs: Run[];
  converged: boolean;
  totalMs: number;
  gapMs: number;
  wireBytes: number;
  cpuMs: { source: number; destination: number };
}

const keyOf = ({ rateMbps, rttMs, writerMBps }: Cell): string => `${rateMbps} ${rttMs} ${writerMBps}`;

/** What the destination holds is nothing to a QEMU of its own, nor to the direct engine. */
const rowKey = ({ cell, mover }: { cell: Cell; mover: Mover }): string =>
  `${keyOf(cell)} ${mover === 'condensed' ? cell.holds : ''} ${mover}`;

/** Of each row the runs at the commit at which it was measured last. */
export function rowsOf(runs: readonly Run[]): Row[] {
  const byKey = Map.groupBy(runs, rowKey);
  const rows = [...byKey.values()].map((all): Row => {
    const last = all.reduce((newest, run) => (run.at >= newest.at ? run : newest));
    const some = all.filter(({ commit }) => commit === last.commit);
    const of = (pick: (run: Run) => number): number => median(some.map(pick));
    return {
      cell: some[0]!.cell,
      mover: some[0]!.mover,
      runs: some,
      converged: some.every(({ converged }) => converged),
      totalMs: of(({ totalMs }) => totalMs),
      gapMs: of(({ gapMs }) => gapMs),
      wireBytes: of(({ wireBytes }) => wireBytes),
      cpuMs: { source: of(({ cpuMs }) => cpuMs.source), destination: of(({ cpuMs }) => cpuMs.destination) },
    };
  });
  const order = ({ cell, mover }: Row): number[] => [
    cell.writerMBps,
    -cell.rateMbps,
    cell.rttMs,
    movers.indexOf(mover),
    cell.holds === 'image' ? 0 : 1,
  ];
  return rows.toSorted((a, b) => {
    const [left, right] = [order(a), order(b)];
    const at = left.findIndex((value, index) => value !== right[index]);
    return at < 0 ? 0 : left[at]! - right[at]!;
  });
}

/** What the link leaves of a handoff of the guest: its unique bytes at the link's rate, and 4 round trips. */
export const physicsMs = ({ rateMbps, rttMs, holds }: Cell, minimum: Minimum): number | undefined =>
  // What a guest has changed while it was away depends on the minute.
  holds === 'stayed' ? undefined : (minimum.unique[holds].bytes * 8) / (rateMbps * 1000) + 4 * rttMs;

const wantedGapMs = ({ rttMs }: Cell): number => 1.5 * rttMs + 200;

const nameOf = ({ mover, cell }: { mover: Mover; cell: Cell }): string =>
  mover === 'condensed' ? `${moverNames[mover]}, ${cell.holds}` : moverNames[mover];
const seconds = (ms: number): string => (ms / 1000).toFixed(ms < 10_000 ? 2 : 1);

export function markdownOf(runs: readonly Run[], minimum: Minimum, notes: readonly string[]): string {
  const rows = rowsOf(runs);
  const lines: string[] = [];
  for (const writer of new Set(rows.map(({ cell }) => cell.writerMBps))) {
    const some = rows.filter(({ cell }) => cell.writerMBps === writer);
    lines.push(
      `## ${writer === 0 ? 'Idle guest' : `Guest that writes ${writer} MB/s`}`,
      '',
      tableOf(some, rows, minimum),
      '',
    );
  }
  return [...notes, '', ...lines].join('\n').trimEnd();
}

function tableOf(some: readonly Row[], rows: readonly Row[], minimum: Minimum): string {
  const head = [
    'link',
    'moved by',
    'total, s',
    'times faster than stock',
    'of physics',
    'gap, ms',
    'gap wanted',
    'MB on the wire',
    'CPU source, s',
    'CPU destination, s',
    'runs, load',
  ];
  return table(
    head,
    some.map((row) => {
      const { cell, mover, converged, totalMs, gapMs, wireBytes, cpuMs, runs } = row;
      const stock = rows.find((each) => each.mover === 'precopy' && keyOf(each.cell) === keyOf(cell));
      const faster =
        !stock || isStock(mover) || !converged
          ? ''
          : `${stock.converged ? '' : '> '}${(stock.totalMs / totalMs).toFixed(1)}`;
      const physics = physicsMs(cell, minimum);
      const load = runs.map((run) => run.load.toFixed(1)).join(' ');
      return [
        `${cell.rateMbps}M ${cell.rttMs} ms`,
        nameOf(row),
        converged ? seconds(totalMs) : `never in ${seconds(totalMs)}`,
        faster,
        mover === 'condensed' && converged && cell.writerMBps === 0 && physics
          ? (totalMs / physics).toFixed(2)
          : '',
        converged ? gapMs.toFixed(0) : '',
        isStock(mover) ? '' : wantedGapMs(cell).toFixed(0),
        (wireBytes / 1e6).toFixed(1),
        seconds(cpuMs.source),
        seconds(cpuMs.destination),
        `${runs.length}, ${load}`,
      ];
    }),
  );
}

/** The last run of a VM with a large disk of its own; nothing if there was none. */
export function overlayText(runs: readonly OverlayRun[]): string {
  const last = runs.at(-1);
  if (!last) return '';
  const { cell, totalMs, engineBytes, wireBytes, uniqueBytes, at, load } = last;
  const [engine, wire, unique] = [engineBytes, wireBytes, uniqueBytes].map((bytes) =>
    (bytes / 1e6).toFixed(1),
  );
  return [
    '\n\n## Nothing shared but the image',
    '',
    `The same guest with 1 GB of its own on its disk, half of it in the page cache as well; disk and memory move (${at}, load`,
    `${load.toFixed(1)}, ${cell.rateMbps}M ${cell.rttMs} ms): ${seconds(totalMs)} s, ${engine} MB from the engine (${wire} MB on the wire), where the unique`,
    `content of disk and memory together is ${unique} MB in zstd -1: ${(engineBytes / uniqueBytes).toFixed(2)} times as much (wanted at most 1.2).`,
  ].join('\n');
}

export function csvOf(runs: readonly Run[]): string {
  const head =
    'at,commit,load,rateMbps,rttMs,writerMBps,holds,mover,mode,converged,totalMs,gapMs,calmGapMs,downtimeMs,wireBytes,sourceCpuMs,destinationCpuMs,rounds,finishedAs';
  const rows = runs.map((run) => {
    const {
      at,
      commit,
      load,
      cell,
      mover,
      mode,
      converged,
      totalMs,
      gapMs,
      calmGapMs,
      downtimeMs,
      wireBytes,
      cpuMs,
    } = run;
    const { rateMbps, rttMs, writerMBps, holds } = cell;
    const milliseconds = [totalMs, gapMs, calmGapMs, downtimeMs].map((ms) => ms?.toFixed(0) ?? '');
    return [
      ...[at, commit, load.toFixed(2), rateMbps, rttMs, writerMBps, holds, mover, mode ?? '', converged],
      ...[
        ...milliseconds,
        wireBytes,
        cpuMs.source,
        cpuMs.destination,
        run.rounds ?? '',
        run.finishedAs ?? '',
      ],
    ].join();
  });
  return `${[head, ...rows].join('\n')}\n`;
}

/** Total times, and gaps, of the idle guest. */
export function figuresOf(runs: readonly Run[]): { total: string; gap: string } {
  const rows = rowsOf(runs).filter(({ cell }) => cell.writerMBps === 0);
  const names = [...new Set(rows.map(nameOf))];
  const cells = [...Map.groupBy(rows, ({ cell }) => `${cell.rateMbps}M ${cell.rttMs} ms`)];
  const chart = (title: string, unit: string, pick: (row: Row) => number): string =>
    barChart({
      title,
      subtitle: '2 GB Debian guest, idle, warm page cache; memory only; logarithmic',
      unit,
      groups: cells.map(([label, some]) => ({
        label,
        bars: names.map((name) => {
          const row = some.find((each) => nameOf(each) === name);
          const value = row?.converged ? pick(row) : undefined;
          return { label: name, value, note: row ? 'never' : '' };
        }),
      })),
    });
  return {
    total: chart('Total time of a handoff', 's', ({ totalMs }) => totalMs / 1000),
    gap: chart('Longest silence that a client sees', 'ms', ({ gapMs }) => gapMs),
  };
}
