/** What the runs came to, in the shapes of the paper's figures 3 to 6: a table, a CSV, and drawings. */
import type { MergeStatistics } from '../../model/migration.ts';
import { lineChart } from '../line-chart.ts';
import { median, table } from '../report.ts';
import { barChart } from '../svg.ts';
import type { Rates, Wanted } from './world.ts';

export type Part = 'engines' | 'relays' | 'vms' | 'unhindered';

export interface Run {
  at: string;
  commit: string;
  /** One-minute load of the machine before the run. */
  load: number;
  part: Part;
  place: 'lab' | 'loopback';
  wanted: Wanted;
  rates: Rates;
  rttMs: number;
  vms: number;
  exitMs: number;
  /** Where it was waited for at the same rates. */
  totalMs?: number;
  downtimeMs?: number;
  /** By all sessions of the source: pages, slabs with their replicas, what is told of them. */
  sentBytes: number;
  merge?: MergeStatistics;
  throughput: { at: number; value: number }[];
}

const nameOf = ({ engine, mode, replicas, relays }: Wanted): string =>
  engine === 'relayed' ? `relayed ${mode}, ${relays} relays, ${replicas} replicas` : `${engine} ${mode}`;
const keyOf = ({ part, place, wanted, rates, vms }: Run): string =>
  [part, place, nameOf(wanted), rates.uplinkMbps, rates.destinationMbps, rates.relayMbps, vms].join(' ');
const seconds = (ms: number): string => (ms / 1000).toFixed(1);

export function markdownOf(runs: readonly Run[], notes: readonly string[]): string {
  const head = [
    'part',
    'links up, down, relays, Mbit/s',
    'VMs',
    'moved by',
    'exit, s',
    'whole, s',
    'downtime, ms',
    'MB sent',
    'exit of (MB sent / uplink)',
    'faults',
    'median fault, ms',
    'of RTT',
    'runs, load',
  ];
  const rows = [...Map.groupBy(runs, keyOf).values()].map((some) => {
    const { part, place, wanted, rates, rttMs, vms } = some[0]!;
    const of = (pick: (run: Run) => number | undefined): number => median(some.map((run) => pick(run) ?? 0));
    const idealMs = (of(({ sentBytes }) => sentBytes) * 8) / (rates.uplinkMbps * 1000);
    const faults = of(({ merge }) => merge?.faults);
    const faultMs = of(({ merge }) => merge?.faultMedianMs);
    return [
      `${part}, ${place}`,
      `${rates.uplinkMbps}, ${rates.destinationMbps}, ${rates.relayMbps}`,
      String(vms),
      nameOf(wanted),
      seconds(of(({ exitMs }) => exitMs)),
      some[0]!.totalMs === undefined ? '' : seconds(of(({ totalMs }) => totalMs)),
      of(({ downtimeMs }) => downtimeMs).toFixed(0),
      (of(({ sentBytes }) => sentBytes) / 1e6).toFixed(1),
      (of(({ exitMs }) => exitMs) / idealMs).toFixed(2),
      faults > 0 ? faults.toFixed(0) : '',
      faults > 0 ? faultMs.toFixed(0) : '',
      faults > 0 && rttMs > 0 ? (faultMs / rttMs).toFixed(1) : '',
      `${some.length}, ${some.map(({ load }) => load.toFixed(1)).join(' ')}`,
    ];
  });
  return [...notes, '', table(head, rows)].join('\n');
}

export function csvOf(runs: readonly Run[]): string {
  const head =
    'at,commit,load,part,place,engine,mode,relays,replicas,uplinkMbps,destinationMbps,relayMbps,rttMs,vms,exitMs,totalMs,downtimeMs,sentBytes,faults,faultMedianMs,faultP95Ms,wrong,refetched';
  const rows = runs.map((run) => {
    const { wanted, rates, merge } = run;
    return [
      ...[run.at, run.commit, run.load.toFixed(2), run.part, run.place, wanted.engine, wanted.mode],
      ...[wanted.relays, wanted.replicas, rates.uplinkMbps, rates.destinationMbps, rates.relayMbps],
      ...[
        run.rttMs,
        run.vms,
        run.exitMs.toFixed(0),
        run.totalMs?.toFixed(0) ?? '',
        run.downtimeMs?.toFixed(0) ?? '',
      ],
      ...[run.sentBytes, merge?.faults ?? '', merge?.faultMedianMs ?? '', merge?.faultP95Ms ?? ''],
      ...[merge?.wrong ?? '', merge?.refetched ?? ''],
    ].join();
  });
  return `${[head, ...rows].join('\n')}\n`;
}

/** By file name. */
export function figuresOf(runs: readonly Run[]): Record<string, string> {
  const of = (part: Part) => [
    ...Map.groupBy(
      runs.filter((run) => run.part === part),
      keyOf,
    ).values(),
  ];
  const bars = (some: readonly Run[]) => {
    const whole = some.flatMap(({ totalMs }) => (totalMs === undefined ? [] : [totalMs / 1000]));
    return [
      { label: 'exit', value: median(some.map(({ exitMs }) => exitMs / 1000)) },
      ...(whole.length > 0 ? [{ label: 'whole', value: median(whole) }] : []),
    ];
  };
  const draw = (part: Part, title: string, labelOf: (run: Run) => string): string | undefined => {
    const groups = of(part).map((some) => ({ label: labelOf(some[0]!), bars: bars(some) }));
    if (groups.length === 0) return undefined;
    return barChart({ title, subtitle: 'seconds from the request, logarithmic', unit: 's', groups });
  };
  const short = ({ wanted }: Run) =>
    `${wanted.engine} ${wanted.engine === 'relayed' ? `x${wanted.replicas}` : wanted.mode}`;
  const figures: Record<string, string | undefined> = {
    'engines.svg': draw('engines', 'A destination that takes a tenth of what the source gives', short),
    'relays.svg': draw(
      'relays',
      'More relays, each slower than the source',
      ({ wanted }) => `${wanted.relays}`,
    ),
    'vms.svg': draw('vms', 'More VMs at once', (run) => `${run.vms} ${run.wanted.engine}`),
  };
  const merging = runs.findLast(({ part, wanted }) => part === 'engines' && wanted.engine === 'relayed');
  if (merging)
    figures['throughput.svg'] = lineChart({
      title: 'What the guest did while it moved by way of relays',
      subtitle: 'reads of 128 KiB of its memory, here and there, per second',
      unit: '1/s',
      timeUnit: 's',
      points: merging.throughput.map(({ at, value }) => ({ at: at / 1000, value })),
      spans: [
        { label: 'until the exit', from: 0, to: merging.exitMs / 1000 },
        { label: 'merging', from: merging.exitMs / 1000, to: (merging.totalMs ?? merging.exitMs) / 1000 },
      ],
    });
  return Object.fromEntries(Object.entries(figures).filter(([, svg]) => svg !== undefined)) as Record<
    string,
    string
  >;
}
