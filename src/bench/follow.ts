/**
 * How well a VM follows its device, in the setting of the thesis (section 4.5): cloudlets 20 ms and 350 Mbit/s apart, a
 * device 2 ms and 100 Mbit/s from the one that it is at, a Debian guest that serves it over MPTCP. The device walks from
 * cloudlet to cloudlet, then goes to and fro every 5 s; and what 100 neighbours cost is measured.
 *
 *   npm run bench:follow [-- --handoffs 26] [--ping-pong SECONDS] [--within SECONDS] [--out DIRECTORY]
 *
 * After `--within` no handoff begins any more. It writes a row for each handoff and the samples of the throughput as CSV, the figures as Markdown, and the throughput
 * of the first handoff as the thesis's Fig. 4.3 (SVG).
 */
import { execFileSync } from 'node:child_process';
import { mkdir, readFile, writeFile } from 'node:fs/promises';
import { loadavg } from 'node:os';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import { Lab } from '../lab/lab.ts';
import type { StreamSample } from '../lab/probes/stream.ts';
import { type Handoff, Walk } from '../lab/walk.ts';
import { lineChart } from './line-chart.ts';
import { measureRefresh } from './neighbours.ts';
import { median, table } from './report.ts';

const { values: options } = parseArgs({
  options: {
    handoffs: { type: 'string', default: '26' },
    'ping-pong': { type: 'string', default: '130' },
    within: { type: 'string', default: '3600' },
    out: { type: 'string', default: 'results/follow' },
  },
});
const wanted = { handoffs: count('handoffs'), pingPongS: count('ping-pong'), withinS: count('within') };

const streamBps = 4_000_000;
const migration = { engine: 'condensed', mode: 'hybrid', bandwidthBps: 200_000_000 };
const follow = { measureEveryMs: 5000, cooldownMs: 5000, migration };
const pingPongEveryMs = 5000;
const way = ['c1', 'c2', 'c3'];
const device = 'phone';

const { signal } = new AbortController();
const began = performance.now();
const say = (text: string): void =>
  console.error(`${((performance.now() - began) / 1000).toFixed(1).padStart(8)} s  ${text}`);

function count(name: 'handoffs' | 'ping-pong' | 'within'): number {
  const value = Number(options[name]);
  if (Number.isInteger(value) && value >= 0 && value <= 100_000) return value;
  throw new Error(`--${name} is '${options[name]}', wanted 0 to 100000`);
}

interface PingPong {
  seconds: number;
  walks: number;
  /** Within any 60 s. */
  mostMigrationsAMinute: number;
  migrations: number;
}

/** With the settings that an operator has who sets none, the device changes its LAN every 5 s. */
async function pingPong(walk: Walk, lab: Lab, seconds: number): Promise<PingPong> {
  for (const cloudlet of walk.fleet.cloudlets) {
    const file = path.join(cloudlet.directory, 'config.json');
    const { follow: _ours, ...config } = JSON.parse(await readFile(file, 'utf8'));
    await writeFile(file, JSON.stringify({ ...config, follow: { migration } }));
    await cloudlet.stop();
    await cloudlet.start();
  }
  const fromMs = Date.now();
  let walks = 0;
  for (; Date.now() - fromMs < seconds * 1000; walks += 1) {
    await lab.move(device, { to: way[1 + (walks % 2)]!, gapMs: 100, signal });
    await sleep(pingPongEveryMs);
  }
  const begins: number[] = [];
  for (const { viper } of walk.fleet.cloudlets)
    for (const { role, createdAt } of (await viper.listMigrations({ query: { limit: 200 }, signal })).items)
      if (role === 'source' && Date.parse(createdAt) >= fromMs) begins.push(Date.parse(createdAt));
  const within = (begin: number): number =>
    begins.filter((other) => other >= begin && other < begin + 60_000).length;
  return {
    seconds: (Date.now() - fromMs) / 1000,
    walks,
    migrations: begins.length,
    mostMigrationsAMinute: Math.max(0, ...begins.map(within)),
  };
}

/** The time of the first handoff, as the thesis names its parts. */
function chartOf(handoff: Handoff, samples: readonly StreamSample[]): string {
  const { from, to, leftMs, arrivedMs, resumedMs, downtimeMs, settledMs } = handoff;
  const [begin, end] = [leftMs - 5000, settledMs + 5000];
  const stoppedMs = resumedMs - downtimeMs;
  const at = (ms: number): number => (ms - begin) / 1000;
  const span = (label: string, fromMs: number, toMs: number) => ({ label, from: at(fromMs), to: at(toMs) });
  return lineChart({
    title: `Throughput while the VM follows its device from ${from} to ${to}`,
    subtitle: 'the server sends 4 Mbit/s; samples of 250 ms',
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

const csv = (rows: readonly object[]): string => {
  const names = Object.keys(rows[0] ?? {});
  const cell = (value: unknown): string =>
    typeof value === 'number' ? String(Math.round(value * 1000) / 1000) : String(value ?? '');
  return [names.join(','), ...rows.map((row) => Object.values(row).map(cell).join(','))]
    .join('\n')
    .concat('\n');
};

const flat = ({ forecast, ...figures }: Handoff) => ({
  ...figures,
  forecastTotalMs: forecast?.totalMs,
  forecastDowntimeMs: forecast?.downtimeMs,
});

/** Median of |forecast - measured| / measured; of the handoffs behind the first `after`, which only teach. */
function forecastErrors(handoffs: readonly Handoff[], after: number): { total: number; downtime: number } {
  const later = handoffs.slice(after).filter(({ forecast }) => forecast !== undefined);
  const off = (forecast: number, measured: number): number => Math.abs(forecast - measured) / measured;
  return {
    total: median(later.map(({ forecast, migrationMs }) => off(forecast!.totalMs, migrationMs))),
    downtime: median(later.map(({ forecast, downtimeMs }) => off(forecast!.downtimeMs, downtimeMs))),
  };
}

interface Measured {
  handoffs: Handoff[];
  samples: StreamSample[];
  verifiedBytes: number;
  pingPong: PingPong | undefined;
}

async function measure(): Promise<Measured> {
  const samples: StreamSample[] = [];
  await using lab = await Lab.up({
    name: `b${process.pid.toString(36)}`,
    cloudlets: way,
    devices: [{ name: device, at: way[0]! }],
  });
  await using walk = await Walk.begin({
    lab,
    config: { follow },
    continuity: 'mptcp',
    streamBps,
    signal,
    tell: say,
    onStream: (sample) => samples.push(sample),
  });
  const handoffs: Handoff[] = [];
  const isInTime = () => performance.now() - began < wanted.withinS * 1000;
  for (let step = 0; step < wanted.handoffs && isInTime(); step += 1) {
    const handoff = await walk.handOff(way[step % 3]!, way[(step + 1) % 3]!);
    handoffs.push(handoff);
    const { totalMs, downtimeMs, gapMs, pingGapMs } = handoff;
    const ms = (value: number) => `${value.toFixed(0)} ms`;
    say(
      `${step + 1}: ${ms(totalMs)}, stopped ${ms(downtimeMs)}, gap ${ms(gapMs)}, of pings ${ms(pingGapMs)}`,
    );
  }
  const bounced = wanted.pingPongS > 0 ? await pingPong(walk, lab, wanted.pingPongS) : undefined;
  const { verifiedBytes } = await walk.end();
  return { handoffs, samples, verifiedBytes, pingPong: bounced };
}

const measured = await measure();
const refresh = await measureRefresh(100);
const { handoffs, samples, pingPong: bounced } = measured;
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
const taught = Math.min(20, Math.floor(handoffs.length / 2));
const errors =
  handoffs.length > 1 ? forecastErrors(handoffs, taught) : { total: Number.NaN, downtime: Number.NaN };
const percent = (share: number): string => `${(share * 100).toFixed(0)} %`;
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
  [`forecast error of the total time, after ${taught}`, 'median 25 %', percent(errors.total)],
  [`forecast error of the downtime, after ${taught}`, 'median 25 %', percent(errors.downtime)],
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
const commit = execFileSync('git', ['rev-parse', '--short', 'HEAD'], { encoding: 'utf8' }).trim();
const report = `# Following a device

\`npm run bench:follow -- --handoffs ${handoffs.length}\` at ${commit}, ${new Date().toISOString().slice(0, 10)}, load ${loadavg()[0]!.toFixed(0)}: ${handoffs.length}
handoffs, ${(measured.verifiedBytes / 1e6).toFixed(0)} MB of the stream verified over one connection. Median (span).

${table(['figure', 'wanted', 'reached'], figures)}

![Throughput](throughput.svg)
`;
await mkdir(options.out, { recursive: true });
const write = (name: string, content: string) => writeFile(path.join(options.out, name), content);
await write('handoffs.csv', csv(handoffs.map(flat)));
await write('throughput.csv', csv(samples.map(({ atMs, bps, totalBytes }) => ({ atMs, bps, totalBytes }))));
if (handoffs[0]) await write('throughput.svg', chartOf(handoffs[0], samples));
await write('README.md', report);
console.log(report);
