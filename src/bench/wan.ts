/**
 * `npm run bench:wan`: the thesis's grid of rates and round trips, with a 2 GB Debian guest whose page cache is warm,
 * idle or writing, moved by plain QEMU in three ways and by Viper in two, over the WAN of a lab; a client asks the guest
 * every 10 ms meanwhile. Each run is appended to `results/wan/runs.jsonl`, so a grid can be measured in pieces, and the
 * report is made of all of them; `--docs` puts it into `docs`.
 *
 *   npm run bench:wan -- [--full | --rates 60,350 --rtts 20,150 | --cells 60/20/0,350/150/8/golden] [--writers 0,8,32] [--movers precopy,condensed]
 *                        [--holds image,golden,stayed] [--overlay] [--rounds N] [--mode auto] [--bound SECONDS] [--report] [--fresh] [--docs]
 */
import { execFile } from 'node:child_process';
import { mkdir, readFile, writeFile } from 'node:fs/promises';
import { loadavg } from 'node:os';
import path from 'node:path';
import { promisify } from 'node:util';
import { Lab } from '../lab/lab.ts';
import { type Cell, isStock, type Mover, parseWanted, type Wanted } from './wan/grid.ts';
import { type WarmGuest, warmGuest } from './wan/guest.ts';
import { type Measured, Results, type Run } from './wan/measured.ts';
import { computeMinimum, type Minimum } from './wan/minimum.ts';
import { type OverlayRun, runOverlay } from './wan/overlay.ts';
import { joinableLab, joinLans } from './wan/places.ts';
import { csvOf, figuresOf, markdownOf, overlayText } from './wan/report.ts';
import { runStock } from './wan/stock.ts';
import { openViperWorld, runViper, type ViperWorld } from './wan/viper.ts';

const root = path.resolve(import.meta.dirname, '../..');
const directory = process.env.RESULTS ?? path.join(root, 'results/wan');
const results = new Results<Run>(path.join(directory, 'runs.jsonl'));
const overlays = new Results<OverlayRun>(path.join(directory, 'overlays.jsonl'));
const began = performance.now();
const say = (text: string): void => {
  console.error(`${((performance.now() - began) / 1000).toFixed(1).padStart(7)} s  ${text}`);
};

const wanted = parseWanted(process.argv.slice(2));
if (wanted.fresh) await results.forget();
if (!wanted.reportOnly) await measure(wanted);
await report();

async function measure(wanted: Wanted): Promise<void> {
  await using lab = await Lab.up({ name: 'wan', ...joinableLab });
  await joinLans(lab);
  const guest = await warmGuest(lab, say);
  await saveMinimum(guest);
  const commit = (
    await promisify(execFile)('git', ['-C', root, 'rev-parse', '--short', 'HEAD'])
  ).stdout.trim();
  await using opened = new AsyncDisposableStack();
  let world: ViperWorld | undefined;
  if (wanted.overlay) {
    const [cell] = wanted.cells;
    world = opened.use(await openViperWorld(lab, guest));
    await lab.link('c1', 'c2', { rttMs: cell!.rttMs, rateBps: cell!.rateMbps * 1e6 });
    const load = loadavg()[0]!;
    const run = await runOverlay(world, { guest, boundMs: wanted.boundMs });
    await overlays.add({ at: new Date().toISOString(), commit, load, cell: cell!, ...run });
    say(`overlay: ${JSON.stringify(run)}`);
    return;
  }
  for (let round = 0; round < wanted.rounds; round += 1)
    for (const cell of wanted.cells)
      for (const mover of wanted.movers) {
        if (!isStock(mover) && !world) world = opened.use(await openViperWorld(lab, guest));
        if (!isStock(mover)) await world?.hold(cell.holds);
        await lab.link('c1', 'c2', { rttMs: cell.rttMs, rateBps: cell.rateMbps * 1e6 });
        const load = loadavg()[0]!;
        const run = await measureOne({ lab, guest, world, cell, mover, wanted });
        const mode = isStock(mover) ? {} : { mode: wanted.mode };
        await results.add({ at: new Date().toISOString(), commit, load, cell, mover, ...mode, ...run });
        tell(cell, mover, run);
      }
}

function measureOne(options: {
  lab: Lab;
  guest: WarmGuest;
  world: ViperWorld | undefined;
  cell: Cell;
  mover: Mover;
  wanted: Wanted;
}): Promise<Measured> {
  const { lab, guest, world, cell, mover, wanted } = options;
  const { boundMs, mode } = wanted;
  if (isStock(mover)) return runStock({ lab, guest, mover, cell, boundMs });
  return runViper(world!, { mover, cell, mode, boundMs });
}

function tell({ rateMbps, rttMs, writerMBps, holds }: Cell, mover: Mover, run: Measured): void {
  const { converged, totalMs, gapMs, calmGapMs, wireBytes, cpuMs } = run;
  const end = converged ? `${(totalMs / 1000).toFixed(2)} s` : `never in ${totalMs / 1000} s`;
  say(
    `${rateMbps}M ${rttMs} ms, ${writerMBps} MB/s, ${holds}, ${mover}: ${end}, gap ${gapMs.toFixed(0)} ms (before ${calmGapMs.toFixed(0)}), ` +
      `${(wireBytes / 1e6).toFixed(1)} MB, CPU ${cpuMs.source} and ${cpuMs.destination} ms`,
  );
  for (const { atMs, what } of run.timeline ?? []) say(`    ${String(atMs).padStart(6)} ms  ${what}`);
}

async function saveMinimum(guest: WarmGuest): Promise<void> {
  await mkdir(directory, { recursive: true });
  const minimum = await computeMinimum(guest);
  say(`minimum: ${JSON.stringify(minimum)}`);
  await writeFile(path.join(directory, 'minimum.json'), JSON.stringify(minimum));
}

async function report(): Promise<void> {
  const minimum: Minimum = JSON.parse(await readFile(path.join(directory, 'minimum.json'), 'utf8'));
  const runs = await results.all();
  const { image, golden } = minimum.unique;
  const megabytes = (bytes: number): string => (bytes / 1e6).toFixed(1);
  const dates = runs.map(({ at }) => at).toSorted();
  const notes = [
    '# A handoff over the WAN, beside plain QEMU',
    '',
    `Measured by \`npm run bench:wan\` from ${dates[0]} to ${dates.at(-1)}, on a machine of 2 cores without KVM (TCG) that`,
    'carries both cloudlets, both QEMUs, the client and the emulated WAN; commit and load of each run are in the CSV.',
    '',
    `The guest has ${minimum.nonZeroPages} pages that are not zero (${megabytes(minimum.nonZeroPages * 4096)} MB). Its unique content`,
    `in zstd -1 is ${megabytes(image.bytes)} MB without what the base image holds, ${megabytes(golden.bytes)} MB without the golden snapshot`,
    'as well. "Of physics" is the total time over these bytes at the rate of the link plus 4 round trips. The disk is on storage',
    'that both sides open, so memory alone moves. The client is on a LAN with both cloudlets, beside the WAN. A row is the median of its',
    'runs at the commit at which it was measured last.',
  ];
  const figures = figuresOf(runs);
  const ofOverlays = overlayText(await overlays.all());
  const text = markdownOf(runs, minimum, [
    ...notes,
    '',
    '![Total time](bench-wan-total.svg)',
    '',
    '![Silence](bench-wan-gap.svg)',
  ]);
  const to = wanted.toDocs ? path.join(root, 'docs') : directory;
  for (const [name, content] of [
    ['bench-wan.md', `${text}${ofOverlays}\n`],
    ['bench-wan-total.svg', figures.total],
    ['bench-wan-gap.svg', figures.gap],
  ] as const)
    await writeFile(path.join(to, name), content);
  await writeFile(path.join(directory, 'bench-wan.csv'), csvOf(runs));
  say(`report of ${runs.length} runs in ${directory}`);
}
