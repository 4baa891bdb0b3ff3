/**
 * The demo, first form: two cloudlets, a Debian guest made through the API on one of them, a clone of it while it
 * runs, both shown alive by what they say themselves, both removed. `npm run demo` sets everything up first.
 */
import { openAsBlob } from 'node:fs';
import { styleText } from 'node:util';
import { LabFleet } from '../src/lab/fleet.ts';
import { guestImage } from '../src/lab/guests.ts';
import { formatBytes } from '../src/model/units.ts';
import type { NodeViper, Operation } from '../src/sdk/node.ts';

const began = performance.now();
const seconds = (ms: number): string => `${(ms / 1000).toFixed(1)} s`;
const elapsed = (): string => seconds(performance.now() - began).padStart(7);
const say = (text: string): void => console.log(`${styleText('dim', elapsed())}  ${text}`);

async function timed<T>(work: Promise<T>): Promise<[T, number]> {
  const start = performance.now();
  return [await work, performance.now() - start];
}

const interrupted = new AbortController();
for (const name of ['SIGINT', 'SIGTERM'] as const) {
  process.on(name, () => {
    if (interrupted.signal.aborted) return;
    console.log(`\n${elapsed()}  ${name}: taking everything down`);
    interrupted.abort(new Error(`ended by ${name}`));
  });
}
const { signal } = interrupted;

/** Waits for an operation and gives it back with its time. */
const finish = (viper: NodeViper, operation: Operation): Promise<[Operation, number]> =>
  timed(viper.wait(operation, { signal }));

async function ticks(viper: NodeViper, vm: string): Promise<number> {
  const reply = await viper.execInGuest({ params: { vm }, body: { argv: ['cat', '/run/ticks'] }, signal });
  return Number(reply.stdout.trim());
}

async function untilAgentAnswers(viper: NodeViper, vm: string): Promise<void> {
  const deadline = AbortSignal.any([signal, AbortSignal.timeout(180_000)]);
  for (;;) {
    deadline.throwIfAborted();
    const answers = await viper.getGuest({ params: { vm }, signal }).then(
      () => true,
      () => false,
    );
    if (answers) return;
    await new Promise((resolve) => setTimeout(resolve, 250));
  }
}

/** The line with which the guest greets on its serial console. */
async function greeting(viper: NodeViper, vm: string): Promise<string> {
  const log = await viper.getConsoleLog({ params: { vm }, signal });
  return /^.*viper guest \S+ ready.*$/m.exec(log)?.[0]?.trim() ?? '(no greeting in the console log)';
}

async function demo(fleet: LabFleet): Promise<string[][]> {
  const summary: string[][] = [];
  const [north, foundMs] = await timed(fleet.add('north'));
  say(`cloudlet ${styleText('bold', 'north')} founded the fleet at ${north.url}`);
  const [south, joinMs] = await timed(fleet.add('south'));
  const { items: peers } = await north.viper.listPeers({ signal });
  say(
    `cloudlet ${styleText('bold', 'south')} joined; north knows ${peers.map((peer) => peer.name).join(', ')}`,
  );
  summary.push(['two cloudlets, one fleet', seconds(foundMs + joinMs)]);
  const { viper } = north;
  const facts = await viper.getCloudlet({ signal });
  say(`QEMU ${facts.qemuVersion}, accelerator ${facts.accelerator}, ${facts.cpus} cores`);

  const file = await openAsBlob(guestImage('debian'));
  const [image, importMs] = await timed(
    viper.importImage({ body: file, query: { alias: 'debian-12' }, signal }),
  );
  say(`image debian-12 is ${image.digest.slice(0, 19)}…, ${formatBytes(image.fileBytes)}`);
  summary.push([`image of ${formatBytes(image.fileBytes)} imported and verified`, seconds(importMs)]);

  const created = await viper.createVm({
    body: { name: 'web-1', image: 'debian-12', instanceType: 'small' },
    signal,
  });
  const [, startMs] = await finish(viper, created);
  say(`VM ${styleText('bold', 'web-1')} runs; Debian boots…`);
  const [, bootMs] = await timed(untilAgentAnswers(viper, 'web-1'));
  say(`its console says: ${styleText('green', await greeting(viper, 'web-1'))}`);
  summary.push(
    ['VM created and started', seconds(startMs)],
    ['Debian booted, agent answers', seconds(bootMs)],
  );

  const before = await ticks(viper, 'web-1');
  const [, cloneMs] = await finish(
    viper,
    await viper.cloneVm({ params: { vm: 'web-1' }, body: { name: 'web-2' }, signal }),
  );
  const [original, clone] = await Promise.all([ticks(viper, 'web-1'), ticks(viper, 'web-2')]);
  const guest = await viper.getGuest({ params: { vm: 'web-2' }, signal });
  say(
    `clone ${styleText('bold', guest.hostname ?? '?')} goes on where web-1 was: ${before} ticks then, now ${clone} (web-1: ${original})`,
  );
  if (guest.hostname !== 'web-2') throw new Error(`the clone calls itself ${guest.hostname}, wanted web-2`);
  if (!(clone >= before)) throw new Error(`the clone counts ${clone} ticks, wanted at least ${before}`);
  summary.push(['running clone (RAM and disk), with its own identity', seconds(cloneMs)]);

  const removing = await Promise.all(
    ['web-1', 'web-2'].map(async (vm) => viper.deleteVm({ params: { vm }, query: { force: true }, signal })),
  );
  const [, removeMs] = await timed(
    Promise.all(removing.map((operation) => viper.wait(operation, { signal }))),
  );
  const { items: left } = await viper.listVms({ signal });
  if (left.length > 0) throw new Error(`${left.length} VMs are left, wanted none`);
  say('both VMs are removed');
  summary.push(['both removed', seconds(removeMs)]);
  await south.viper.getHealth({ signal });
  return summary;
}

let failed = false;
let summary: string[][] = [];
{
  await using fleet = await LabFleet.create();
  try {
    summary = await demo(fleet);
  } catch (error) {
    failed = true;
    const message = error instanceof Error ? error.message : String(error);
    console.error(`${elapsed()}  ${styleText('red', 'failed:')} ${message}`);
  }
}
if (failed) {
  process.exitCode = signal.aborted ? 130 : 1;
} else {
  console.log('\nSummary');
  for (const [what, time] of summary) console.log(`  ${what!.padEnd(52)} ${time!.padStart(8)}`);
  console.log(`  ${'everything, nothing left behind'.padEnd(52)} ${elapsed().padStart(8)}`);
}
