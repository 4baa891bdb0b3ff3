/**
 * Two cloudlets that share nothing, a Debian guest made through the API on one of them, a clone of it while it runs; then the
 * guest moves to the other cloudlet and back, disk and memory, while it writes to both and talks to a client. On the
 * way back the link is cut for 30 s. The guest checks its data itself. `npm run demo:migrate` sets everything up first.
 */
import { openAsBlob } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { styleText } from 'node:util';
import { type LabCloudlet, LabFleet } from '../src/lab/fleet.ts';
import { guestImage } from '../src/lab/guests.ts';
import { formatBytes } from '../src/model/units.ts';
import type { NodeViper, Operation } from '../src/sdk/node.ts';
import { Conversation } from './conversation.ts';

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
  await until(
    'the guest agent answers',
    async () => (await viper.getGuest({ params: { vm }, signal })) !== undefined,
  );
}

/** The line with which the guest greets on its serial console, when it has booted. */
async function greeting(viper: NodeViper, vm: string): Promise<string> {
  let line: string | undefined;
  await until('the guest greets on its console', async () => {
    const log = await viper.getConsoleLog({ params: { vm }, signal });
    line = /^.*viper guest \S+ ready.*$/m.exec(log)?.[0]?.trim();
    return line !== undefined;
  });
  return line!;
}

async function demo(fleet: LabFleet): Promise<string[][]> {
  const summary: string[][] = [];
  const [north, foundMs] = await timed(fleet.add('north', {}, { proxied: true }));
  say(`cloudlet ${styleText('bold', 'north')} founded the fleet at ${north.url}`);
  const [south, joinMs] = await timed(fleet.add('south', {}, { proxied: true }));
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

  await finish(viper, await viper.deleteVm({ params: { vm: 'web-2' }, query: { force: true }, signal }));

  await using client = await Conversation.listen();
  await startWork(viper, 'web-1', client.port);
  say('web-1 now writes to memory and disk, checks what it wrote, and talks to a client every 10 ms');
  summary.push(...(await move('web-1', north, south, client)));
  summary.push(...(await move('web-1', south, north, client, 30_000)));
  const work = await workOf(viper, 'web-1');
  say(
    `its checks: ${work.memory_checked} blocks of memory, ${work.disk_checked} of disk, ${work.replies} answers heard`,
  );
  if (work.memory_bad + work.disk_bad > 0)
    throw new Error(`${work.memory_bad + work.disk_bad} checksums were wrong`);
  summary.push([`${work.memory_checked + work.disk_checked} checksums verified by the guest, 0 wrong`, '']);

  const [, removeMs] = await finish(
    viper,
    await viper.deleteVm({ params: { vm: 'web-1' }, query: { force: true }, signal }),
  );
  for (const each of [north, south]) {
    const { items: left } = await each.viper.listVms({ signal });
    if (left.length > 0) throw new Error(`${left.length} VMs are left at ${each.name}, wanted none`);
  }
  say('both VMs are removed, nothing is left at either cloudlet');
  summary.push(['removed', seconds(removeMs)]);
  return summary;
}

interface Work {
  memory_checked: number;
  memory_bad: number;
  disk_checked: number;
  disk_bad: number;
  replies: number;
}

async function startWork(viper: NodeViper, vm: string, port: number): Promise<void> {
  const input = await readFile(new URL('./guest.py', import.meta.url), 'utf8');
  const start =
    'cat > /root/demo.py && (setsid python3 /root/demo.py "$1" > /run/demo.log 2>&1 < /dev/null &)';
  await viper.execInGuest({
    params: { vm },
    body: { argv: ['/bin/sh', '-c', start, 'demo', String(port)], input },
    signal,
  });
  await until('the guest checks its data', async () => {
    const { memory_checked, disk_checked, replies } = await workOf(viper, vm);
    return memory_checked > 0 && disk_checked > 0 && replies > 0;
  });
}

async function workOf(viper: NodeViper, vm: string): Promise<Work> {
  const { stdout } = await viper.execInGuest({
    params: { vm },
    body: { argv: ['cat', '/run/demo.json'] },
    signal,
  });
  return JSON.parse(stdout || '{}');
}

async function until(what: string, holds: () => Promise<boolean>): Promise<void> {
  const deadline = AbortSignal.timeout(180_000);
  for (;;) {
    signal.throwIfAborted();
    if (await holds().catch(() => false)) return;
    if (deadline.aborted) throw new Error(`waited in vain until ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 250));
  }
}

/** Moves the VM while it works; `cutMs` cuts the link in the middle. */
async function move(
  vm: string,
  from: LabCloudlet,
  to: LabCloudlet,
  client: Conversation,
  cutMs = 0,
): Promise<string[][]> {
  const before = await workOf(from.viper, vm);
  client.beginGap();
  // With a cut the link is slow enough to be in the middle of it.
  const limits = cutMs > 0 ? { bandwidthBps: 400_000_000 } : {};
  const operation = await from.viper.migrateVm({ params: { vm }, body: { to: to.name, limits }, signal });
  const moving = finish(from.viper, operation);
  moving.catch(() => {});
  const migration = operation.subject.migrationId!;
  if (cutMs > 0) {
    await until('memory is on its way', async () => {
      const { progress } = await from.viper.getMigration({ params: { migration }, signal });
      return progress?.phase === 'memory' && progress.doneBytes > progress.totalBytes / 10;
    });
    for (const { link } of [from, to]) link?.cut();
    say(`the link is cut for ${seconds(cutMs)} in the middle of it…`);
    await new Promise((resolve) => setTimeout(resolve, cutMs));
    for (const { link } of [from, to]) link?.restore();
  }
  const [, totalMs] = await moving;
  await until('the guest goes on with its checks', async () => {
    const now = await workOf(to.viper, vm);
    return now.memory_checked > before.memory_checked && now.replies > before.replies;
  });
  const { result } = await from.viper.getMigration({ params: { migration }, signal });
  const moved = formatBytes((result?.memoryBytes ?? 0) + (result?.diskBytes ?? 0));
  const downtime = `${result?.downtimeMs?.toFixed(0)} ms`;
  say(
    `${vm} moved from ${from.name} to ${to.name}: ${moved}, ${downtime} stopped, gap ${client.gapMs.toFixed(0)} ms`,
  );
  const how = cutMs > 0 ? `, link cut for ${seconds(cutMs)}` : '';
  return [
    [`moved ${from.name} to ${to.name} while it ran (${result?.finishedAs}${how})`, seconds(totalMs)],
    [`  ${moved} moved, downtime ${downtime}, client's longest silence`, `${client.gapMs.toFixed(0)} ms`],
  ];
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
  for (const [what, time] of summary) console.log(`  ${what!.padEnd(66)} ${time!.padStart(8)}`);
  console.log(`  ${'everything, nothing left behind'.padEnd(66)} ${elapsed().padStart(8)}`);
}
