/**
 * A VM follows its device from LAN to LAN and back, over real daemons, a real guest and the kernel's MPTCP, while one
 * connection carries a sequence whose every byte is checked; then the same with plain TCP over a stretched LAN.
 */
import assert from 'node:assert/strict';
import type { ChildProcess } from 'node:child_process';
import { openAsBlob, readFileSync } from 'node:fs';
import path from 'node:path';
import { after, before, test } from 'node:test';
import { type LabCloudlet, LabFleet } from '../../src/lab/fleet.ts';
import { guestImage } from '../../src/lab/guests.ts';
import { Lab } from '../../src/lab/lab.ts';
import { MiB } from '../../src/model/units.ts';
import type { Continuity } from '../../src/model/vm.ts';
import { type Command, MptcpDevice, monitorLines, mptcpMonitorCommand } from '../../src/network/index.ts';
import { run } from '../../src/vm/run.ts';
import { booted, done, EventRecorder, patienceMs, sh, until } from './lab-vm.ts';
import { type Line, labName, lineOf, ping, probe, probeMptcp, skip } from './lab-world.ts';

const options = { skip, timeout: 1_200_000 };
const servers = readFileSync(path.resolve(import.meta.dirname, '../../src/lab/probes/servers.py'));
const { signal } = new AbortController();
const [echoPort, streamPort] = [7001, 7002];
/** Slow enough for a guest without KVM on a busy machine. */
const streamBps = 2_000_000;
/** Tunnels and bridges of single VMs; taps are called `vip` as well. */
const isolated = /^(vipx[0-9a-f]{6}|vipb[0-9a-f]{8}n\d+)(?=[@ ])/;

let lab: Lab;
let fleet: LabFleet;
let c1: LabCloudlet;
let c2: LabCloudlet;
let phone: MptcpDevice;

if (!skip) {
  before(async () => {
    lab = await Lab.up({
      name: labName('n'),
      cloudlets: ['c1', 'c2'],
      devices: [{ name: 'phone', at: 'c1' }],
    });
    fleet = await LabFleet.create(lab);
    c1 = await fleet.add('c1');
    c2 = await fleet.add('c2');
    for (const { viper } of [c1, c2])
      await viper.importImage({ body: await openAsBlob(guestImage('debian')), query: { alias: 'debian' } });
    const hardware = {
      memoryBytes: 256 * MiB,
      nets: [{ network: 'lan' }, { network: 'lan' }],
    };
    const body = { name: 'web', image: 'debian', instanceType: 'small', hardware };
    await done(c1.viper, c1.viper.createVm({ body }));
    await booted(c1.viper, 'web');
    await serve();
    phone = new MptcpDevice({
      run: (program, args, each) => inPhone([program, ...args], each.signal),
      monitor: (each) => monitorLines(lab.commandIn('phone', mptcpMonitorCommand), each),
    });
    await phone.start(radioAt('c1'), signal);
  }, options);
  after(async () => {
    phone?.[Symbol.dispose]();
    await fleet?.[Symbol.asyncDispose]();
    await lab?.[Symbol.asyncDispose]();
  });
}

function inPhone(command: Command, each: AbortSignal) {
  const [program, ...args] = lab.commandIn('phone', command);
  return run(program, args, { signal: each });
}

const radioAt = (site: string) => ({
  device: 'wlan0',
  address: lab.device('phone').addressAt(lab.site(site)),
});

/** The servers of the probes in the guest, MPTCP for whoever asks for it. */
async function serve(): Promise<void> {
  const argv = ['/bin/sh', '-c', 'cat >/root/servers.py'];
  await c1.viper.execInGuest({ params: { vm: 'web' }, body: { argv, input: servers.toString() } });
  const start = `mptcpize run python3 /root/servers.py ${echoPort} ${streamPort} ${streamBps}`;
  await sh(c1.viper, 'web', `setsid ${start} </dev/null >/run/servers.log 2>&1 & sleep 0.1`);
  await until('the servers', () => sh(c1.viper, 'web', 'grep listening /run/servers.log'));
}

async function addressOf({ viper }: LabCloudlet): Promise<string> {
  const { attachment } = await viper.getVm({ params: { vm: 'web' } });
  return attachment!.place.address.split('/')[0]!;
}

/** One connection of the phone to the VM, until it is ended. */
function stream(to: string, protocol: 'mptcp' | 'tcp') {
  const argv = ['stream', '--to', `${to}:${streamPort}`];
  return protocol === 'tcp' ? probe(lab, 'phone', ...argv) : probeMptcp(lab, 'phone', ...argv);
}

/** More bytes than before have come. */
async function flows({ lines }: { lines: AsyncIterator<Line> }): Promise<number> {
  const first = Number((await lineOf(lines, 'sample')).totalBytes);
  for (;;) {
    const total = Number((await lineOf(lines, 'sample')).totalBytes);
    if (total > first) return total;
  }
}

async function end({ child, lines }: { child: ChildProcess; lines: AsyncIterator<Line> }): Promise<Line> {
  child.kill('SIGTERM');
  return lineOf(lines, 'summary');
}

/** The VM moves, its connections go on in the way that was asked for, and its guest has settled down. */
async function handOff(from: LabCloudlet, to: LabCloudlet, continuity: Continuity): Promise<void> {
  await using there = new EventRecorder(to.viper);
  await using here = new EventRecorder(from.viper);
  const body = { to: to.name, continuity, mode: 'precopy' as const };
  const operation = await from.viper.migrateVm({ params: { vm: 'web' }, body });
  const isOurs = ({ data }: { data: Record<string, unknown> }) =>
    data.migrationId === operation.subject.migrationId;
  const begun = await here.first(
    'the way of its connections',
    (event) => event.kind === 'vm.continuity' && isOurs(event),
  );
  const isAsWanted = begun.data.continuity === continuity;
  const connections = isAsWanted ? '' : await sh(from.viper, 'web', 'ss -tniO');
  assert.ok(isAsWanted, `${JSON.stringify(begun)}\n${connections}`);
  await from.viper.wait(operation, { timeoutMs: 2 * patienceMs });
  const arrived = await there.first('its address', (event) => event.kind === 'vm.address' && isOurs(event));
  assert.equal(arrived.data.unfinished, undefined, JSON.stringify(arrived));
}

/** What Viper has made for single VMs on the host of a cloudlet, beside taps. */
async function tunnelsAt(site: string): Promise<string[]> {
  const [program, ...args] = lab.commandIn(site, ['ip', '-br', 'link']);
  const { stdout } = await run(program, args, { signal });
  return stdout.split('\n').flatMap((line) => isolated.exec(line)?.[0] ?? []);
}

test('an MPTCP connection goes on while device and VM walk there and back', options, async (context) => {
  const one = stream(await addressOf(c1), 'mptcp');
  await flows(one);
  for (const [from, to] of [
    [c1, c2],
    [c2, c1],
  ] as const) {
    await lab.move('phone', { to: to.name });
    assert.deepEqual(await phone.arrived(radioAt(to.name), signal), { joined: 'yes' });
    await flows(one);
    await handOff(from, to, 'mptcp');
    await flows(one);
    assert.equal((await booted(to.viper, 'web')).hostname, 'web');
    const { attachment } = await to.viper.getVm({ params: { vm: 'web' } });
    assert.equal(attachment!.place.subnet, lab.site(to.name).lan);
    await until(
      'the end of the tunnels',
      async () => (await tunnelsAt('c1')).length + (await tunnelsAt('c2')).length === 0,
    );
  }
  const { brokenBy, verifiedBytes, longestGap } = await end(one);
  assert.equal(brokenBy, undefined);
  context.diagnostic(JSON.stringify({ verifiedBytes, longestGap }));
});

test('plain TCP outlives the move of the VM there and back over a stretched LAN', options, async () => {
  const address = await addressOf(c1);
  const one = stream(address, 'tcp');
  await flows(one);
  await handOff(c1, c2, 'stretch');
  await flows(one);
  assert.equal(await addressOf(c2), address);
  // From the LAN there the way leads straight to it.
  await lab.move('phone', { to: 'c2' });
  const straight = await ping(lab, 'phone', address, '-c', '5', '-i', '0.5');
  assert.ok(straight.received > 0, JSON.stringify(straight));
  await lab.move('phone', { to: 'c1' });
  await flows(one);
  await handOff(c2, c1, 'stretch');
  await flows(one);
  assert.equal((await end(one)).brokenBy, undefined);
  assert.deepEqual([await tunnelsAt('c1'), await tunnelsAt('c2')], [[], []]);
});
