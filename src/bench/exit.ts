/**
 * `npm run bench:exit`: how soon a source is free of a VM whose destination takes a tenth of what the source gives, by
 * each engine; with 1 to 4 relays; with several VMs at once; and what relays cost where the destination is not slow. All
 * in a lab of namespaces. Each run is appended to `results/exit/runs.jsonl`, so it can be measured in pieces, and the
 * report is made of all of them; `--docs` puts it into `docs`. `--only` takes those whose JSON matches; `--quick`
 * does not look how long the destination takes.
 *
 *   npm run bench:exit -- [--parts engines,relays,vms,unhindered] [--vms 1,3] [--rounds N] [--memory MiB] [--filled MiB]
 *                         [--does reads|writes] [--only PATTERN] [--quick] [--loopback] [--report] [--fresh] [--docs]
 *
 * `--loopback` goes without namespaces, and so without delay; see `exit/world.ts`.
 */
import { execFile } from 'node:child_process';
import { appendFile, mkdir, readFile, rm, writeFile } from 'node:fs/promises';
import { loadavg } from 'node:os';
import path from 'node:path';
import { parseArgs, promisify } from 'node:util';
import { csvOf, figuresOf, markdownOf, type Part, type Run } from './exit/report.ts';
import { ExitWorld, type Rates, type Wanted } from './exit/world.ts';

const { values: wanted } = parseArgs({
  options: {
    parts: { type: 'string', default: 'engines,relays,vms,unhindered' },
    vms: { type: 'string', default: '1,3' },
    rounds: { type: 'string', default: '1' },
    loopback: { type: 'boolean', default: false },
    report: { type: 'boolean', default: false },
    fresh: { type: 'boolean', default: false },
    docs: { type: 'boolean', default: false },
    only: { type: 'string', default: '' },
    quick: { type: 'boolean', default: false },
    memory: { type: 'string', default: '128' },
    filled: { type: 'string', default: '24' },
    does: { type: 'string', default: 'reads' },
  },
});
const root = path.resolve(import.meta.dirname, '../..');
const directory = process.env.RESULTS ?? path.join(root, 'results/exit');
const file = path.join(directory, 'runs.jsonl');
const began = performance.now();
const say = (text: string): void => {
  console.error(`${((performance.now() - began) / 1000).toFixed(1).padStart(7)} s  ${text}`);
};

const rttMs = wanted.loopback ? 0 : 20;
/** Slow enough for a machine of two cores to carry all of it, emulation included. */
const uplinkMbps = Number(process.env.UPLINK_MBPS ?? 40);
const slow: Rates = { uplinkMbps, destinationMbps: uplinkMbps / 10, relayMbps: 2 * uplinkMbps };
const relayed = (more: Partial<Wanted> = {}): Wanted => ({
  engine: 'relayed',
  mode: 'postcopy',
  relays: 3,
  replicas: 2,
  ...more,
});
const other = (engine: 'direct' | 'condensed', mode: Wanted['mode']): Wanted => ({
  engine,
  mode,
  relays: 0,
  replicas: 0,
});
if (wanted.does !== 'reads' && wanted.does !== 'writes')
  throw new Error(`--does is ${wanted.does}, wanted reads or writes`);
const does = wanted.does;
const size = { memoryMiB: Number(wanted.memory), filledMiB: Number(wanted.filled) };

interface Case {
  part: Part;
  wanted: Wanted;
  rates: Rates;
  vms: number;
}

const cases: Case[] = [
  ...[
    relayed(),
    other('direct', 'postcopy'),
    relayed({ replicas: 1 }),
    other('condensed', 'postcopy'),
    other('direct', 'precopy'),
    relayed({ mode: 'hybrid' }),
  ].map((each): Case => ({ part: 'engines', wanted: each, rates: slow, vms: 1 })),
  ...[1, 2, 3, 4].map(
    (relays): Case => ({
      part: 'relays',
      wanted: relayed({ relays, replicas: 1 }),
      rates: { ...slow, relayMbps: uplinkMbps / 3 },
      vms: 1,
    }),
  ),
  ...[relayed(), other('condensed', 'postcopy')].map(
    (each): Case => ({
      part: 'unhindered',
      wanted: each,
      rates: { uplinkMbps, destinationMbps: 2 * uplinkMbps, relayMbps: 2 * uplinkMbps },
      vms: 1,
    }),
  ),
  ...wanted.vms
    .split(',')
    .flatMap((vms) =>
      [relayed(), other('condensed', 'postcopy')].map(
        (each): Case => ({ part: 'vms', wanted: each, rates: slow, vms: Number(vms) }),
      ),
    ),
];

if (wanted.fresh) await rm(file, { force: true });
const isWanted = (each: Case): boolean =>
  wanted.parts.split(',').includes(each.part) && new RegExp(wanted.only).test(JSON.stringify(each));
if (!wanted.report) await measure(cases.filter(isWanted));
await report();

async function measure(some: readonly Case[]): Promise<void> {
  const commit = (
    await promisify(execFile)('git', ['-C', root, 'rev-parse', '--short', 'HEAD'])
  ).stdout.trim();
  const names = Array.from(
    { length: Math.max(...some.map(({ vms }) => vms)) },
    (_, index) => `vm${index + 1}`,
  );
  await using world = await ExitWorld.open({
    relays: Math.max(2, ...some.map((each) => each.wanted.relays)),
    rttMs,
    isLoopback: wanted.loopback,
  });
  await world.boot(names, { ...size, does });
  say(`${names.length} guests are up`);
  for (let round = 0; round < Number(wanted.rounds); round += 1)
    for (const each of some) {
      await world.setRates(each.rates);
      const load = loadavg()[0]!;
      const moving = names.slice(0, each.vms);
      const isExitAll = wanted.quick || each.part === 'relays' || each.part === 'vms';
      const { results, totalMs, ...move } = await world.move(moving, each.wanted, isExitAll);
      await world.verify(moving, move.isCalledOff ? world.source : world.destination);
      const [first] = results;
      const run: Run = {
        ...each,
        ...move,
        ...(isExitAll || move.isCalledOff ? {} : { totalMs }),
        does,
        place: wanted.loopback ? 'loopback' : 'lab',
        at: new Date().toISOString(),
        commit,
        load,
        size,
        rttMs,
        ...(first?.downtimeMs === undefined ? {} : { downtimeMs: first.downtimeMs }),
        ...(first?.merge ? { merge: first.merge } : {}),
      };
      await mkdir(directory, { recursive: true });
      await appendFile(file, `${JSON.stringify(run)}\n`);
      say(
        `${each.part}, ${each.vms} VMs, ${JSON.stringify(each.wanted)}: exit ${(run.exitMs / 1000).toFixed(1)} s, ` +
          `whole ${run.totalMs === undefined ? '' : (run.totalMs / 1000).toFixed(1)} s, ${(run.sentBytes / 1e6).toFixed(1)} MB sent, ` +
          `downtime ${run.downtimeMs?.toFixed(0)} ms, ${JSON.stringify(run.merge ?? {})}`,
      );
      if (!move.isCalledOff) await world.bringBack(moving);
    }
}

async function report(): Promise<void> {
  const text = await readFile(file, 'utf8');
  const runs: Run[] = text
    .trim()
    .split('\n')
    .map((line) => JSON.parse(line));
  const dates = runs.map(({ at }) => at).toSorted();
  const notes = [
    '# How soon a source is free',
    '',
    `Measured by \`npm run bench:exit\` from ${dates[0]} to ${dates.at(-1)}, on a machine of 2 cores without KVM (TCG) that`,
    `carries all cloudlets, all QEMUs and the emulated links (round trips of ${rttMs} ms); other work shared it, so each row has its load.`,
    'A guest has 128 MiB of memory and 24 MiB of content in it where nothing else is said, half of it random and half text, and reads it here and there',
    'all the while (or writes 8 MiB more, where that is said, as fast as it can); at the end it verifies it. One that had not ended after 280 s was',
    "called off. The disk is on storage that all open. `direct` is QEMU's own stream over the",
    'link. All guests are of one tenant and have the same text. A row is the median of its runs at the commit at which it was measured',
    'last. *MB sent* is all that left the source in sessions of the link, to the destination and to relays; a slab leaves once where',
    'relays give it on to each other, and as often as the source itself had to send it. *Of (MB / uplink)* is the exit over the time',
    'that so many bytes take at the rate of the uplink.',
  ];
  const figures = figuresOf(runs);
  const to = wanted.docs ? path.join(root, 'docs') : directory;
  await writeFile(path.join(to, 'bench-exit.md'), `${markdownOf(runs, notes, Object.keys(figures))}\n`);
  for (const [name, svg] of Object.entries(figures)) await writeFile(path.join(to, name), svg);
  await writeFile(path.join(directory, 'exit.csv'), csvOf(runs));
  say(`report of ${runs.length} runs in ${to}`);
}
