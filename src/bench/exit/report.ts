/** What the runs came to, in the shapes of the paper's figures 3 to 6: a table, a CSV, and drawings. */
import type { MergeStatistics } from '../../model/migration.ts';
import { lineChart } from '../line-chart.ts';
import { median, table } from '../report.ts';
import { type Bar, type BarGroup, barChart } from '../svg.ts';
import type { Step } from '../timeline.ts';
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
  /** Of each guest; missing where it was 128 MiB with 24 MiB of content. */
  size?: { memoryMiB: number; filledMiB: number };
  /** Missing where it reads. */
  does?: 'reads' | 'writes';
  /** Or until it was called off. */
  exitMs: number;
  isCalledOff?: boolean;
  /** Where it was waited for at the same rates. */
  totalMs?: number;
  downtimeMs?: number;
  /** By all sessions of the source: pages, slabs with their replicas, what is told of them. */
  sentBytes: number;
  merge?: MergeStatistics;
  throughput: { at: number; value: number }[];
  /** Of the first VM. */
  timeline?: Step[];
}

const count = (many: number, what: string): string => `${many} ${what}${many === 1 ? '' : 's'}`;
const nameOf = ({ engine, mode, replicas, relays }: Wanted): string =>
  engine === 'relayed'
    ? `relayed ${mode}, ${count(relays, 'relay')}, ${count(replicas, 'replica')}`
    : `${engine} ${mode}`;
const keyOf = (run: Run): string => {
  const { part, place, wanted, rates, vms } = run;
  return [
    part,
    place,
    nameOf(wanted),
    sizeOf(run),
    rates.uplinkMbps,
    rates.destinationMbps,
    rates.relayMbps,
    vms,
  ].join(' ');
};
const sizeOf = ({ size, does }: Run): string =>
  (size && size.memoryMiB !== 128 ? `, ${size.memoryMiB} MiB guest with ${size.filledMiB} MiB` : '') +
  (does === 'writes' ? ', guest writes' : '');
const seconds = (ms: number): string => (ms / 1000).toFixed(1);

const titles: Record<Part, string> = {
  engines: 'A destination that takes a tenth of what the source gives',
  relays: 'More relays, each a third as fast as the source',
  vms: 'Several VMs at once',
  unhindered: 'A destination that is not slow',
};

interface Row {
  run: Run;
  runs: Run[];
  exitMs: number;
  totalMs: number | undefined;
  downtimeMs: number;
  sentBytes: number;
  /** Over what those bytes take at the rate of the uplink. */
  ofIdeal: number;
  faults: number;
  faultMs: number;
}

/** Medians; of each row the runs at the commit at which it was measured last. */
export function rowsOf(runs: readonly Run[]): Row[] {
  return [...Map.groupBy(runs, keyOf).values()].map((all) => {
    const last = all.reduce((newest, run) => (run.at >= newest.at ? run : newest));
    const some = all.filter(({ commit }) => commit === last.commit);
    const of = (pick: (run: Run) => number | undefined): number => median(some.map((run) => pick(run) ?? 0));
    const exitMs = of((run) => run.exitMs);
    const sentBytes = of((run) => run.sentBytes);
    return {
      run: last,
      runs: some,
      exitMs,
      totalMs: last.totalMs === undefined ? undefined : of(({ totalMs }) => totalMs),
      downtimeMs: of(({ downtimeMs }) => downtimeMs),
      sentBytes,
      ofIdeal: exitMs / ((sentBytes * 8) / (last.rates.uplinkMbps * 1000)),
      faults: of(({ merge }) => merge?.faults),
      faultMs: of(({ merge }) => merge?.faultMedianMs),
    };
  });
}

export function markdownOf(
  runs: readonly Run[],
  notes: readonly string[],
  pictures: readonly string[],
): string {
  const rows = rowsOf(runs);
  const sections = Object.entries(titles).flatMap(([part, title]) => {
    const some = rows.filter(({ run }) => run.part === part);
    if (some.length === 0) return [];
    const shown = pictures.filter((name) => name.includes(part));
    return ['', `## ${title}`, '', tableOf(some), ...shown.flatMap((name) => ['', `![${title}](${name})`])];
  });
  const throughput = pictures.filter((name) => name.includes('throughput'));
  return [
    ...notes,
    ...sections,
    ...(throughput.length > 0 ? ['', '## The guest meanwhile'] : []),
    ...throughput.flatMap((name) => ['', `![The guest meanwhile](${name})`]),
  ].join('\n');
}

function tableOf(rows: readonly Row[]): string {
  const head = [
    'moved by',
    'VMs',
    'Mbit/s: source, destination, relays',
    'exit, s',
    'of (MB / uplink)',
    'whole, s',
    'stopped, ms',
    'MB sent',
    'faults at relays, median ms (of RTT)',
    'runs, commit, load',
  ];
  const cells = rows.map(
    ({ run, runs, exitMs, totalMs, downtimeMs, sentBytes, ofIdeal, faults, faultMs }) => {
      const { wanted, rates, rttMs, vms, place, commit } = run;
      const ofRtt = rttMs > 0 ? ` (${(faultMs / rttMs).toFixed(1)})` : '';
      return [
        `${nameOf(wanted)}${sizeOf(run)}${place === 'lab' ? '' : `, ${place}`}`,
        String(vms),
        `${rates.uplinkMbps}, ${Number(rates.destinationMbps.toFixed(1))}, ${Number(rates.relayMbps.toFixed(1))}`,
        `${run.isCalledOff ? 'not after ' : ''}${seconds(exitMs)}`,
        run.isCalledOff ? '' : ofIdeal.toFixed(2),
        totalMs === undefined ? '' : seconds(totalMs),
        run.isCalledOff ? '' : downtimeMs.toFixed(0),
        (sentBytes / 1e6).toFixed(1),
        // Links that are free from the exit on say nothing of faults.
        faults > 0 && totalMs !== undefined ? `${faults.toFixed(0)}, ${faultMs.toFixed(0)}${ofRtt}` : '',
        `${runs.length}, ${commit}, ${runs.map(({ load }) => load.toFixed(1)).join(' ')}`,
      ];
    },
  );
  return table(head, cells);
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

/** By file name: in the shapes of the paper's figures 3 (engines), 5 (VMs) and 6 (relays), the last also for the guest. */
export function figuresOf(runs: readonly Run[]): Record<string, string> {
  const rows = rowsOf(runs);
  const draw = (part: Part, groupsOf: (some: readonly Row[]) => BarGroup[]): string | undefined => {
    const some = rows.filter(({ run }) => run.part === part);
    if (some.length === 0) return undefined;
    const subtitle = 'seconds from the request, logarithmic';
    return barChart({ title: titles[part], subtitle, unit: 's', groups: groupsOf(some) });
  };
  const times = (some: readonly Row[]): BarGroup[] => [
    { label: 'exit', bars: some.map((row) => bar(row, row.exitMs)) },
    { label: 'whole', bars: some.map((row) => bar(row, row.totalMs)) },
  ];
  const exits = (labelOf: (run: Run) => string) => (some: readonly Row[]) =>
    [...Map.groupBy(some, ({ run }) => labelOf(run))].map(
      ([label, each]): BarGroup => ({ label, bars: each.map((row) => bar(row, row.exitMs)) }),
    );
  const figures: Record<string, string | undefined> = {
    'bench-exit-engines.svg': draw('engines', times),
    'bench-exit-relays.svg': draw(
      'relays',
      exits(({ wanted }) => count(wanted.relays, 'relay')),
    ),
    'bench-exit-vms.svg': draw(
      'vms',
      exits(({ vms }) => count(vms, 'VM')),
    ),
    'bench-exit-unhindered.svg': draw('unhindered', times),
  };
  for (const writes of [false, true]) {
    const merging = runs.findLast(
      ({ part, wanted, does, totalMs }) =>
        part === 'engines' &&
        wanted.engine === 'relayed' &&
        wanted.mode === 'postcopy' &&
        (does === 'writes') === writes &&
        totalMs !== undefined,
    );
    if (merging)
      figures[`bench-exit-throughput${writes ? '-writes' : ''}.svg`] = drawThroughput(merging, writes);
  }
  return Object.fromEntries(Object.entries(figures).filter(([, svg]) => svg !== undefined)) as Record<
    string,
    string
  >;
}

/** Named without what differs between the groups. */
const bar = ({ run }: Row, ms: number | undefined): Bar => {
  const { wanted, part } = run;
  const { engine, mode, replicas } = wanted;
  const copies = part === 'relays' ? '' : `, ${count(replicas, 'replica')}`;
  return {
    label: engine === 'relayed' ? `relayed ${mode}${copies}${sizeOf(run)}` : `${engine} ${mode}`,
    value: ms === undefined ? undefined : ms / 1000,
  };
};

function drawThroughput({ throughput, exitMs, totalMs }: Run, writes: boolean): string {
  return lineChart({
    title: 'What the guest did while it moved by way of relays',
    subtitle: `128 KiB of its memory ${writes ? 'written' : 'read'}, here and there, per second`,
    unit: '1/s',
    timeUnit: 's',
    points: throughput.map(({ at, value }) => ({ at: at / 1000, value })),
    spans: [
      { label: 'until the exit', from: 0, to: exitMs / 1000 },
      { label: 'merging', from: exitMs / 1000, to: (totalMs ?? exitMs) / 1000 },
    ],
  });
}
