/** What bench:follow shows of what it measured: figures as Markdown, rows as CSV, and the thesis's Fig. 4.3 as SVG. */
import type { StreamSample } from '../lab/probes/stream.ts';
import type { Handoff } from '../lab/walk.ts';
import { lineChart } from './line-chart.ts';
import type { RefreshCost } from './neighbours.ts';
import { median, table } from './report.ts';

export interface PingPong {
  seconds: number;
  walks: number;
  /** Within any 60 s. */
  mostMigrationsAMinute: number;
  migrations: number;
}

export interface Forecast {
  at: string;
  forecastMs: { total: number; downtime: number };
  measuredMs: { total: number; downtime: number };
}

/** So many migrations a forecast may have learned from before it is held against what came of it. */
const taughtBy = 20;

export interface Measured {
  handoffs: Handoff[];
  samples: StreamSample[];
  verifiedBytes: number;
  pingPong: PingPong | undefined;
  forecasts: Forecast[];
}

export function reportOf(
  { handoffs, forecasts, pingPong: bounced, verifiedBytes }: Measured,
  refresh: RefreshCost,
  { commit, load, at }: { commit: string; load: number; at: Date },
): string {
  const of = (
    name:
      | 'attachedToStartedMs'
      | 'gapMs'
      | 'pingGapMs'
      | 'roamGapMs'
      | 'totalMs'
      | 'downtimeMs'
      | 'arrivalToRunningMs',
  ) => handoffs.map((each) => each[name]);
  const ms = (value: number): string => `${value.toFixed(0)} ms`;
  const spread = (values: readonly number[]): string =>
    `${ms(median(values))} (${ms(Math.min(...values))} to ${ms(Math.max(...values))})`;
  const taught = Math.min(taughtBy, Math.floor((forecasts.length * 2) / 3));
  const later = forecasts.slice(taught);
  const percent = (share: number): string =>
    Number.isNaN(share) ? 'too few' : `${(share * 100).toFixed(0)} %`;
  const sentMB = handoffs.reduce((sum, { sentBytes }) => sum + sentBytes, 0) / 1e6;
  const contentMB = handoffs.reduce((sum, { contentBytes }) => sum + contentBytes, 0) / 1e6;
  const figures: string[][] = [
    ['device in the new LAN to migration started', 'under 1 s', spread(of('attachedToStartedMs'))],
    ['application gap at the changeover', 'median 120 ms, worst 500 ms', spread(of('gapMs'))],
    ['gap of pings every 10 ms', 'median 80 ms', spread(of('pingGapMs'))],
    ['VM stopped', '', spread(of('downtimeMs'))],
    ['gap while the device is between LANs (300 ms in none)', '', spread(of('roamGapMs'))],
    ['device in the new LAN to VM running there', '', spread(of('arrivalToRunningMs'))],
    ['request to all done', 'thesis: 14 s', spread(of('totalMs'))],
    ['travelled, of the VM’s content', '', `${sentMB.toFixed(0)} of ${contentMB.toFixed(0)} MB`],
    [
      `forecast error of the total time, ${later.length} after ${taught}`,
      'median 25 %',
      percent(errorOf(later, 'total')),
    ],
    [
      `forecast error of the downtime, ${later.length} after ${taught}`,
      'median 25 %',
      percent(errorOf(later, 'downtime')),
    ],
    ...(bounced
      ? [
          [
            `most migrations in a minute, the device in another LAN every 5 s (${bounced.walks} walks)`,
            'at most 1',
            String(bounced.mostMigrationsAMinute),
          ],
        ]
      : []),
    [
      'one refresh of 100 neighbours, share of a core at one a minute',
      'under 1 %',
      `${(refresh.coreShare * 100).toFixed(2)} %`,
    ],
  ];
  return `# Following a device

\`npm run bench:follow -- --handoffs ${handoffs.length}\` at ${commit}, ${at.toISOString().slice(0, 10)}, load ${load.toFixed(0)}: ${handoffs.length}
handoffs, ${(verifiedBytes / 1e6).toFixed(0)} MB of the stream verified over one connection. Median (span).

${table(['figure', 'wanted', 'reached'], figures)}

![Throughput](throughput.svg)
`;
}

/** The one whose gap is the median, or next to it. */
export const ordinaryOf = (handoffs: readonly Handoff[]): Handoff =>
  handoffs.toSorted((a, b) => a.gapMs - b.gapMs)[handoffs.length >> 1]!;

/** One handoff over time, in the parts that the thesis names. */
export function chartOf(handoff: Handoff, samples: readonly StreamSample[]): string {
  const { from, to, leftMs, arrivedMs, resumedMs, downtimeMs, settledMs } = handoff;
  const [begin, end] = [leftMs - 5000, settledMs + 1000];
  const stoppedMs = resumedMs - downtimeMs;
  const at = (ms: number): number => (ms - begin) / 1000;
  const span = (label: string, fromMs: number, toMs: number) => ({ label, from: at(fromMs), to: at(toMs) });
  return lineChart({
    title: `Throughput while the VM follows its device from ${from} to ${to}`,
    subtitle: 'the server sends 2 Mbit/s; samples of 250 ms',
    unit: 'Mbit/s',
    timeUnit: 's',
    points: samples
      .filter(({ atMs }) => atMs >= begin && atMs <= end)
      .map(({ atMs, bps }) => ({ at: at(atMs), value: bps / 1e6 })),
    spans: [
      span('A: near', begin, leftMs),
      span('B: in no LAN', leftMs, arrivedMs),
      span('C: over the WAN, migrating', arrivedMs, stoppedMs),
      span('D: VM stands still', stoppedMs, resumedMs),
      span('E: near', resumedMs, end),
    ],
  });
}

export const csv = (rows: readonly object[]): string => {
  const names = Object.keys(rows[0] ?? {});
  const cell = (value: unknown): string =>
    typeof value === 'number' ? String(Math.round(value * 1000) / 1000) : String(value ?? '');
  return [names.join(','), ...rows.map((row) => Object.values(row).map(cell).join(','))]
    .join('\n')
    .concat('\n');
};

/** Median of |forecast - measured| / measured. */
const errorOf = (forecasts: readonly Forecast[], what: 'total' | 'downtime'): number =>
  median(
    forecasts.map(
      ({ forecastMs, measuredMs }) => Math.abs(forecastMs[what] - measuredMs[what]) / measuredMs[what],
    ),
  );
