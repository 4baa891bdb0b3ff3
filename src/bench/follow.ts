/**
 * How well a VM follows its device, in the setting of the thesis (section 4.5): cloudlets 20 ms and 350 Mbit/s apart, a
 * device 2 ms and 100 Mbit/s from the one that it is at, a Debian guest that serves it over MPTCP. The device walks from
 * cloudlet to cloudlet, then goes to and fro every 5 s; and what 100 neighbours cost is measured.
 *
 *   npm run bench:follow [-- --handoffs 26] [--ping-pong SECONDS] [--within SECONDS] [--out DIRECTORY]
 *
 * After `--within` no handoff begins any more. It writes a row for each handoff and the samples of the throughput as CSV, the figures as Markdown, and the throughput
 * of an ordinary handoff as the thesis's Fig. 4.3 (SVG).
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
import {
  chartOf,
  csv,
  type Forecast,
  type Measured,
  ordinaryOf,
  type PingPong,
  reportOf,
} from './follow-report.ts';
import { measureRefresh } from './neighbours.ts';

const { values: options } = parseArgs({
  options: {
    handoffs: { type: 'string', default: '26' },
    'ping-pong': { type: 'string', default: '130' },
    within: { type: 'string', default: '3600' },
    out: { type: 'string', default: 'results/follow' },
  },
});
const wanted = { handoffs: count('handoffs'), pingPongS: count('ping-pong'), withinS: count('within') };

const streamBps = 2_000_000;
const migration = { bandwidthBps: 200_000_000 };
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
  const least = name === 'handoffs' ? 1 : 0;
  if (Number.isInteger(value) && value >= least && value <= 100_000) return value;
  throw new Error(`--${name} is '${options[name]}', wanted ${least} to 100000`);
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
    for (const { at, acted } of (await viper.listDecisions({ query: { limit: 200 }, signal })).items)
      if (acted && Date.parse(at) >= fromMs) begins.push(Date.parse(at));
  const within = (begin: number): number =>
    begins.filter((other) => other >= begin && other < begin + 60_000).length;
  return {
    seconds: (Date.now() - fromMs) / 1000,
    walks,
    migrations: begins.length,
    mostMigrationsAMinute: Math.max(0, ...begins.map(within)),
  };
}

/** What each decision was made with, and what its migration came to, oldest first. */
async function forecastsOf(walk: Walk): Promise<Forecast[]> {
  const found: Forecast[] = [];
  for (const { viper } of walk.fleet.cloudlets) {
    const { items } = await viper.listDecisions({ query: { limit: 200 }, signal });
    for (const { at, candidates, target, result } of items) {
      const forecast = candidates.find(({ cloudletId }) => cloudletId === target?.id)?.forecast;
      if (!forecast || !result?.moved || !result.totalMs || !result.downtimeMs) continue;
      found.push({
        at,
        forecastMs: { total: forecast.totalMs, downtime: forecast.downtimeMs },
        measuredMs: { total: result.totalMs, downtime: result.downtimeMs },
      });
    }
  }
  return found.toSorted((a, b) => (a.at < b.at ? -1 : 1));
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
  const forecasts = await forecastsOf(walk);
  const { verifiedBytes } = await walk.end();
  return { handoffs, samples, verifiedBytes, pingPong: bounced, forecasts };
}

const commit = execFileSync('git', ['rev-parse', '--short', 'HEAD'], { encoding: 'utf8' }).trim();
const measured = await measure();
const refresh = await measureRefresh(100);
const { handoffs, samples } = measured;
const load = loadavg()[0]!;
const report = reportOf(measured, refresh, { commit, load, at: new Date() });
await mkdir(options.out, { recursive: true });
const write = (name: string, content: string) => writeFile(path.join(options.out, name), content);
await write('handoffs.csv', csv(handoffs));
await write('throughput.csv', csv(samples.map(({ atMs, bps, totalBytes }) => ({ atMs, bps, totalBytes }))));
await write('throughput.svg', chartOf(ordinaryOf(handoffs), samples));
await write('README.md', report);
console.log(report);
