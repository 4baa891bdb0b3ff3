/**
 * The walk: three cloudlets in a lab of network namespaces, 20 ms and 350 Mbit/s between them, and a Debian guest that
 * serves a stream to a device over one MPTCP connection. The device walks c1, c2, c3, c1; its VM follows by itself.
 *
 *   npm run demo:walk [-- --json] [-- --keep]
 *
 * `--json` prints the table as JSON and nothing else on standard output; `--keep` leaves the lab up.
 */
import { openAsBlob } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { setTimeout as sleep } from 'node:timers/promises';
import { parseArgs, styleText } from 'node:util';
import Table from 'cli-table3';
import { type LabCloudlet, LabFleet } from '../src/lab/fleet.ts';
import { guestImage } from '../src/lab/guests.ts';
import { Lab } from '../src/lab/lab.ts';
import { MiB } from '../src/model/units.ts';
import type { Decision } from '../src/sdk/node.ts';
import { type Gap, Programs, type StreamEnd } from './programs.ts';

const { values: options } = parseArgs({
  options: { json: { type: 'boolean', default: false }, keep: { type: 'boolean', default: false } },
});
const vm = 'web';
const device = 'phone';
const [echoPort, streamPort] = [7001, 7002];
/** What a guest without KVM can send on a busy machine. */
const streamBps = 4_000_000;
const patienceMs = 300_000;
/** Below the rate of the WAN, so that the stream has room beside the migration. */
const migration = { mode: 'precopy', bandwidthBps: 200_000_000 };
const config = { follow: { measureEveryMs: 5000, cooldownMs: 5000, migration } };

const began = performance.now();
const say = (text: string): void => {
  const at = `${((performance.now() - began) / 1000).toFixed(1)} s`.padStart(8);
  console.error(`${styleText('dim', at)}  ${text}`);
};
const interrupted = new AbortController();
for (const name of ['SIGINT', 'SIGTERM'] as const)
  process.once(name, () => interrupted.abort(new Error(`ended by ${name}`)));
const { signal } = interrupted;

interface Handoff {
  from: string;
  to: string;
  /** From the first sign of the device's walk to the decision. */
  decisionMs: number;
  /** From the device's arrival to the begin of the migration. */
  attachedToStartedMs: number;
  totalMs: number;
  downtimeMs: number;
  /** Since the epoch: the device was in its new LAN, and the VM beside it. */
  arrivedMs: number;
  settledMs: number;
  rttBeforeMs: number;
  rttViaWanMs: number;
  rttAfterMs: number;
}

async function until<T>(what: string, ask: () => Promise<T | undefined>): Promise<T> {
  const deadline = performance.now() + patienceMs;
  for (;;) {
    signal.throwIfAborted();
    const found = await ask().catch(() => undefined);
    if (found !== undefined && found !== false) return found;
    if (performance.now() > deadline) throw new Error(`waited in vain for ${what}`);
    await sleep(100, undefined, { signal });
  }
}

/** The VM is there with its servers. */
async function prepare(cloudlets: LabCloudlet[]): Promise<void> {
  const [{ viper }] = cloudlets as [LabCloudlet];
  for (const each of cloudlets)
    await each.viper.importImage({
      body: await openAsBlob(guestImage('debian')),
      query: { alias: 'debian' },
    });
  const hardware = { memoryBytes: 256 * MiB, nets: [{ network: 'lan' }, { network: 'lan' }] };
  const body = { name: vm, image: 'debian', instanceType: 'small', hardware, continuity: 'mptcp' as const };
  await viper.wait(await viper.createVm({ body, signal }), { signal });
  await until('the guest', async () => (await viper.getGuest({ params: { vm }, signal })).hostname);
  const servers = await readFile(new URL('../src/lab/probes/servers.py', import.meta.url), 'utf8');
  const exec = (script: string, input?: string) =>
    viper.execInGuest({
      params: { vm },
      body: { argv: ['/bin/sh', '-c', script], ...(input === undefined ? {} : { input }) },
      signal,
    });
  await exec('cat >/root/servers.py', servers);
  const start = `mptcpize run python3 /root/servers.py ${echoPort} ${streamPort} ${streamBps}`;
  await exec(`setsid ${start} </dev/null >/run/servers.log 2>&1 & sleep 0.1`);
  await until(
    'the servers',
    async () => (await exec('grep listening /run/servers.log')).exitCode === 0 || undefined,
  );
}

async function addressOf({ viper }: LabCloudlet): Promise<string> {
  const { attachment } = await viper.getVm({ params: { vm }, signal });
  return attachment!.place.address.split('/')[0]!;
}

/** One step of the walk, and the VM's way after the device. */
async function follow(world: {
  lab: Lab;
  programs: Programs;
  from: LabCloudlet;
  to: LabCloudlet;
}): Promise<Handoff> {
  const { lab, programs, from, to } = world;
  const rttBeforeMs = await programs.ping(await addressOf(from));
  const known = new Set(
    (await from.viper.listDecisions({ query: { limit: 200 }, signal })).items.map(({ id }) => id),
  );
  const leftMs = Date.now();
  await lab.move(device, { to: to.name, gapMs: 300, signal });
  say(`${device} walked from ${from.name} to ${to.name}`);
  const pinging = programs.ping(await addressOf(from));
  const latest = async (isIt: (decision: Decision) => boolean) =>
    (await from.viper.listDecisions({ query: { limit: 200 }, signal })).items.find(
      (decision) => !known.has(decision.id) && isIt(decision),
    );
  const decision = await until('a decision', () => latest(({ acted }) => acted));
  const rttViaWanMs = await pinging;
  const operation = await from.viper.getOperation({ params: { operation: decision.operationId! }, signal });
  const arrivedMs = await until('the arrival', async () => programs.arrivedAfter(leftMs));
  say(
    `${from.name} decided in ${decision.tookMs.toFixed(0)} ms: ${decision.outcome} to ${decision.target?.name} (${decision.trigger.message})`,
  );
  const over = await until('the handoff', () => latest(({ result }) => result !== undefined));
  if (!over.result!.moved) throw new Error(`${vm} did not move to ${to.name}: ${over.result!.message}`);
  await until(
    'the VM there',
    async () => (await to.viper.getVm({ params: { vm }, signal })).state === 'running' || undefined,
  );
  const address = await until('its new address', async () => {
    const now = await addressOf(to);
    return now.startsWith(lab.site(to.name).lan.split('.').slice(0, 2).join('.')) ? now : undefined;
  });
  await programs.flows();
  const settledMs = Date.now();
  const rttAfterMs = await programs.ping(address);
  const { totalMs = 0, downtimeMs = 0 } = over.result!;
  say(`${vm} is at ${to.name}: ${totalMs.toFixed(0)} ms in all, ${downtimeMs.toFixed(0)} ms stopped`);
  return {
    from: from.name,
    to: to.name,
    decisionMs: decision.tookMs,
    attachedToStartedMs: Date.parse(operation.createdAt) - arrivedMs,
    totalMs,
    downtimeMs,
    arrivedMs,
    settledMs,
    rttBeforeMs,
    rttViaWanMs,
    rttAfterMs,
  };
}

/** The longest silence of the application from the device's arrival until its VM had settled; 0 if all were under 100 ms. */
const gapOf = ({ arrivedMs, settledMs }: Handoff, gaps: Gap[]): number =>
  Math.max(
    0,
    ...gaps.filter(({ fromMs, toMs }) => toMs > arrivedMs && fromMs < settledMs).map(({ ms }) => ms),
  );

function show(handoffs: Handoff[], { gaps, stream }: { gaps: Gap[]; stream: StreamEnd }): void {
  if (options.json) {
    const rows = handoffs.map((each) => ({ ...each, gapMs: gapOf(each, gaps) }));
    console.log(JSON.stringify({ handoffs: rows, stream }));
    return;
  }
  const table = new Table({
    head: ['handoff', 'attached to start', 'total', 'downtime', 'gap', 'RTT before', 'via WAN', 'after'],
    style: { head: [] },
  });
  const ms = (value: number): string => `${value.toFixed(value < 10 ? 1 : 0)} ms`;
  for (const each of handoffs)
    table.push([
      `${each.from} to ${each.to}`,
      ...[each.attachedToStartedMs, each.totalMs, each.downtimeMs, gapOf(each, gaps)].map(ms),
      ...[each.rttBeforeMs, each.rttViaWanMs, each.rttAfterMs].map(ms),
    ]);
  console.log(table.toString());
  console.log(`1 TCP connection, 0 resets, ${stream.verifiedBytes} bytes verified`);
}

async function walk(lab: Lab): Promise<void> {
  await using fleet = await LabFleet.create(lab);
  const cloudlets: LabCloudlet[] = [];
  for (const { name } of lab.layout.sites) cloudlets.push(await fleet.add(name, config));
  say('three cloudlets in one fleet, 20 ms and 350 Mbit/s apart; a phone at c1');
  await prepare(cloudlets);
  const first = cloudlets[0]!;
  const address = await addressOf(first);
  say(`${vm} runs at c1 with the address ${address}, and serves a stream over MPTCP`);
  const { mac, addressAt } = lab.device(device);
  const made = await first.viper.createDevice({
    body: { name: device, vm, macs: [mac], addresses: [addressAt(lab.site('c1'))] },
    signal,
  });
  await using programs = new Programs({
    lab,
    device,
    companion: { url: first.url, caFile: first.caFile, token: made.secret },
    echo: `${address}:${echoPort}`,
    stream: `${address}:${streamPort}`,
    onSample: (bps) => process.stderr.isTTY && process.stderr.write(`\r${(bps / 1e6).toFixed(1)} Mbit/s \r`),
  });
  await programs.flows();
  await until('the first report of the device', async () => programs.isReporting || undefined);
  const handoffs: Handoff[] = [];
  const way = [...cloudlets, first];
  for (const [index, from] of way.slice(0, -1).entries())
    handoffs.push(await follow({ lab, programs, from, to: way[index + 1]! }));
  const end = await programs.end();
  if (end.stream.brokenBy !== undefined) throw new Error(`the connection broke: ${end.stream.brokenBy}`);
  show(handoffs, end);
  if (options.keep) await fleet.leave();
}

const lab = await Lab.up({
  name: 'walk',
  cloudlets: ['c1', 'c2', 'c3'],
  devices: [{ name: device, at: 'c1' }],
});
try {
  await walk(lab);
  if (options.keep) await lab.stay();
} catch (error) {
  console.error(styleText('red', `failed: ${(error as Error).message}`));
  process.exitCode = signal.aborted ? 130 : 1;
} finally {
  if (!options.keep) await lab[Symbol.asyncDispose]();
}
