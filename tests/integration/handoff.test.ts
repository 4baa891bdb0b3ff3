/**
 * The plans of a handoff in the real kernel, without QEMU: the guest is a network namespace whose interfaces are moved
 * from cloudlet to cloudlet, its agent runs the guest's script in there, and over a WAN of the lab a connection is
 * carried along whose every byte is checked.
 */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { after, before, type TestContext, test } from 'node:test';
import { perform, performAnyway } from '../../src/daemon/networks/effects.ts';
import { Lab } from '../../src/lab/lab.ts';
import { inNamespace, planNamespace } from '../../src/lab/namespaces.ts';
import { newId } from '../../src/model/ids.ts';
import type { Continuity, Place } from '../../src/model/vm.ts';
import {
  type Action,
  bridgeFor,
  type Command,
  type GuestNetwork,
  guestRequest,
  type Handoff,
  type HandoffStep,
  handoverModes,
  MptcpDevice,
  monitorLines,
  mptcpMonitorCommand,
  newVni,
  parseStatus,
  planDestination,
  planGuard,
  planGuardRemoval,
  planSource,
  requireDone,
  tapName,
} from '../../src/network/index.ts';
import type { Machine } from '../../src/vm/machine.ts';
import { run as runOnHost } from '../../src/vm/run.ts';
import { until } from './lab-vm.ts';
import { type Line, labName, lineOf, ping, probe, probeMptcp, skip } from './lab-world.ts';

const options = { skip, timeout: 300_000 };
const { signal } = new AbortController();
const owner = newId();
const vmId = newId();
const macs = ['02:00:00:00:01:00', '02:00:00:00:01:01'] as const;
const port = 7002;
/** Tunnels and bridges of single VMs; taps are called `vip` as well. */
const isolated = /^(vipx[0-9a-f]{6}|vip[bm][0-9a-f]{8}n\d+)(?=[@ ])/;
type SiteName = 'c1' | 'c2';

let lab: Lab;
let phone: MptcpDevice;
let vm: string;

/** A guest whose agent answers at once. */
const machine = {
  agent: {
    ping: async () => {},
    exec: async ({ argv, input }: { argv: [string, ...string[]]; input: string }) => inGuest(argv, input),
    close: () => {},
  },
} as unknown as Machine;

function inGuest(
  argv: Command,
  input: string,
): Promise<{ exitCode: number; stdout: string; stderr: string }> {
  // With the /sys of the namespace, in which the script looks for its interfaces.
  const child = spawn('ip', ['netns', 'exec', vm, ...argv], { stdio: 'pipe' });
  child.stdin.end(input);
  const [stdout, stderr] = [child.stdout, child.stderr].map(async (stream) => {
    let text = '';
    for await (const piece of stream.setEncoding('utf8')) text += piece;
    return text;
  });
  return once(child, 'exit').then(async ([exitCode]) => ({
    exitCode: exitCode as number,
    stdout: (await stdout)!,
    stderr: (await stderr)!,
  }));
}

const runIn = (namespace: string) => (program: string, args: readonly string[]) => {
  const [file, ...rest] = inNamespace(namespace, [program, ...args]);
  return runOnHost(file, rest, { signal });
};
const runAt = (site: SiteName) => runIn(lab.site(site).namespace);
const ip = (namespace: string, ...args: string[]) => runIn(namespace)('ip', args);

const doAt = (site: SiteName, action: Action) => perform(action, { run: runAt(site), machine, signal });
const undoAt = async (site: SiteName, actions: Action[]) => {
  for (const action of actions)
    assert.deepEqual(await performAnyway(action, { run: runAt(site), machine }), []);
};

const placeAt = (site: SiteName, last: number): Place => {
  const { lan, gateway } = lab.site(site);
  return { address: gateway.replace(/\.1$/, `.${last}/24`), subnet: lan, gateway };
};
const hostOf = ({ address }: Place): string => address.split('/')[0]!;
const radioAt = (site: SiteName) => ({
  device: 'wlan0',
  address: lab.device('phone').addressAt(lab.site(site)),
});

async function status(): Promise<GuestNetwork> {
  const { argv, input } = guestRequest({ name: 'status' });
  return parseStatus(await inGuest(argv, input));
}

/** The VM is at the other cloudlet from one moment to the next: its cables are pulled and plugged in there. */
async function move(from: SiteName, to: SiteName, handoff: Handoff): Promise<void> {
  for (const index of [0, 1]) {
    const tap = tapName(vmId, index);
    await ip(
      lab.site(from).namespace,
      'link',
      'set',
      'dev',
      tap,
      'nomaster',
      'netns',
      lab.site(to).namespace,
    );
    const bridge = bridgeFor(handoff, index) ?? handoff.bridge;
    await ip(lab.site(to).namespace, 'link', 'set', 'dev', tap, 'master', bridge, 'up');
  }
}

/** One handoff as the two cloudlets plan it. */
function plansOf(
  continuity: Continuity,
  from: SiteName,
  to: SiteName,
  serving: number,
  last: Place,
  next?: Place,
) {
  const waiting = 1 - serving;
  const common = {
    owner,
    vmId,
    continuity,
    bridge: 'lan0',
    serving,
    waiting,
    last: { ...last, mac: macs[serving]! },
    ...(next ? { next: { ...next, mac: macs[waiting]! } } : {}),
    gatewayMac: lab.site(from).gatewayMac,
    hop: { device: `wan-${to}`, via: lab.layout.links[0]!.addresses[from === 'c1' ? 1 : 0]! },
  };
  const [vni, near, far] = [newVni(), lab.site(from).address, lab.site(to).address];
  const [here, there] = [
    { ...common, tunnel: { vni, local: near, remote: far } },
    { ...common, tunnel: { vni, local: far, remote: near } },
  ];
  return { here, there, source: planSource(here), destination: planDestination(there) };
}

async function handOff(
  continuity: Continuity,
  {
    from,
    to,
    serving,
    last,
    next,
  }: { from: SiteName; to: SiteName; serving: number; last: Place; next?: Place },
): Promise<Handoff> {
  const { there, source, destination } = plansOf(continuity, from, to, serving, last, next);
  for (const step of destination.before) await doAt(to, step.run);
  for (const step of source.before) await doAt(from, step.run);
  await move(from, to, there);
  await undoAt(from, source.after);
  await undoAt(to, destination.after);
  return there;
}

async function flows({ lines }: { lines: AsyncIterator<Line> }): Promise<void> {
  const first = Number((await lineOf(lines, 'sample')).totalBytes);
  while (Number((await lineOf(lines, 'sample')).totalBytes) <= first);
}

const devicesAt = async (site: SiteName): Promise<string[]> => {
  const { stdout } = await runAt(site)('ip', ['-br', 'link']);
  return stdout.split('\n').flatMap((line) => isolated.exec(line)?.[0] ?? []);
};

async function walk(to: SiteName): Promise<void> {
  await lab.move('phone', { to });
  assert.deepEqual(await phone.arrived(radioAt(to), signal), { joined: 'yes' });
}

if (!skip) {
  before(async () => {
    lab = await Lab.up({
      name: labName('h'),
      cloudlets: ['c1', 'c2'],
      devices: [
        { name: 'phone', at: 'c1' },
        { name: 'tablet', at: 'c1', cellular: {} },
      ],
    });
    vm = `viper-${lab.name}-guest`;
    for (const [program, ...args] of planNamespace(vm, { forwards: false }))
      await runOnHost(program, args, { signal });
    const { namespace } = lab.site('c1');
    for (const [index, mac] of macs.entries()) {
      const tap = tapName(vmId, index);
      await ip(
        vm,
        'link',
        'add',
        `eth${index}`,
        'address',
        mac,
        'type',
        'veth',
        'peer',
        'name',
        tap,
        'netns',
        namespace,
      );
      await ip(vm, 'link', 'set', 'dev', `eth${index}`, 'up');
      await ip(namespace, 'link', 'set', 'dev', tap, 'master', 'lan0', 'up');
    }
    const { address, gateway } = placeAt('c1', 10);
    await ip(vm, 'address', 'add', address, 'dev', 'eth0');
    await ip(vm, 'route', 'add', 'default', 'via', gateway);
    const inPhone = lab.commandIn('phone', mptcpMonitorCommand);
    phone = new MptcpDevice({
      run: (program, args) => runIn(lab.device('phone').namespace)(program, args),
      monitor: (each) => monitorLines(inPhone, each),
    });
    await phone.start(radioAt('c1'), signal);
  }, options);
  after(async () => {
    phone?.[Symbol.dispose]();
    await lab?.[Symbol.asyncDispose]();
  });
}

type Program = ReturnType<typeof probe>;

/** Bytes that came to the tablet over its subflows from that address; undefined if there is none. */
async function cameOver(address: string): Promise<number | undefined> {
  const { namespace } = lab.device('tablet');
  const query = ['-tniOH', 'state', 'established', 'src', address, 'dport', `:${port}`];
  const { stdout } = await runIn(namespace)('ss', query);
  const counts = stdout.split('\n').flatMap((line) => (line.includes('token:') ? [line] : []));
  if (counts.length === 0) return undefined;
  return counts.reduce((sum, line) => sum + Number(/ bytes_received:(\d+)/.exec(line)?.[1] ?? 0), 0);
}

/** A server of the probes in the guest; it ends with the test. */
async function serve(context: TestContext, by: typeof probe): Promise<void> {
  const guest = { commandIn: (_: string, command: Command) => inNamespace(vm, command) } as unknown as Lab;
  const server = by(guest, 'vm', 'stream-server', '--listen', `0.0.0.0:${port}`, '--rate', '2000000');
  context.after(() => server.child.kill('SIGKILL'));
  await lineOf(server.lines, 'listening');
}

/** A client in the phone, or another device, to which bytes come; it ends with the test. */
async function connect(
  context: TestContext,
  by: typeof probe,
  to: Place,
  device = 'phone',
): Promise<Program> {
  const client = by(lab, device, 'stream', '--to', `${hostOf(to)}:${port}`);
  context.after(() => client.child.kill('SIGKILL'));
  await flows(client);
  return client;
}

/** Ends the connection, which was whole until then. */
async function finish({ child, lines }: Program): Promise<void> {
  child.kill('SIGTERM');
  const { brokenBy, verifiedBytes } = await lineOf(lines, 'summary');
  assert.equal(brokenBy, undefined);
  assert.ok(Number(verifiedBytes) > 0);
}

const undoesOf = (steps: HandoffStep[]): Action[] => steps.toReversed().flatMap(({ undo }) => undo ?? []);

const devicesOfBoth = async () => [await devicesAt('c1'), await devicesAt('c2')];

test('one MPTCP connection outlives handoffs there, back and there again', options, async (context) => {
  await serve(context, probeMptcp);
  let last = placeAt('c1', 10);
  const client = await connect(context, probeMptcp, last);
  for (const [serving, from, to] of [
    [0, 'c1', 'c2'],
    [1, 'c2', 'c1'],
    [0, 'c1', 'c2'],
    [1, 'c2', 'c1'],
  ] as const) {
    await walk(to);
    const next = placeAt(to, to === 'c1' ? 10 : 20);
    await handOff('mptcp', { from, to, serving, last, next });
    await flows(client);
    const { interfaces, subflows } = await status();
    const waits = [1500, []];
    const serves = [1500, [next.address]];
    assert.deepEqual(
      interfaces.map(({ mtu, addresses }) => [mtu, addresses]),
      serving === 0 ? [waits, serves] : [serves, waits],
    );
    assert.deepEqual([...new Set(subflows.map(({ local }) => local))], [`${hostOf(next)}:${port}`]);
    assert.deepEqual(await devicesOfBoth(), [[], []]);
    last = next;
  }
  await finish(client);
});

test(
  'a handoff that is undone leaves addresses, cables and the connection as they were',
  options,
  async (context) => {
    await serve(context, probeMptcp);
    const last = placeAt('c1', 10);
    const client = await connect(context, probeMptcp, last);
    const { source, destination } = plansOf('mptcp', 'c1', 'c2', 0, last, placeAt('c2', 30));
    for (const step of destination.before) await doAt('c2', step.run);
    for (const step of source.before) await doAt('c1', step.run);
    await flows(client);
    await undoAt('c1', undoesOf(source.before));
    await undoAt('c2', undoesOf(destination.before));
    await flows(client);
    const { interfaces, subflows } = await status();
    assert.deepEqual(
      interfaces.map(({ addresses }) => addresses),
      [[last.address], []],
    );
    assert.ok(subflows.every(({ local }) => local === `${hostOf(last)}:${port}`));
    assert.deepEqual(await devicesOfBoth(), [[], []]);
    await finish(client);
  },
);

test('the VM may set out while its device is still arriving', options, async (context) => {
  await serve(context, probeMptcp);
  const last = placeAt('c1', 10);
  const client = await connect(context, probeMptcp, last);
  await lab.move('phone', { to: 'c2' });
  const next = placeAt('c2', 40);
  await Promise.all([
    handOff('mptcp', { from: 'c1', to: 'c2', serving: 0, last, next }),
    phone.arrived(radioAt('c2'), signal),
  ]);
  await flows(client);
  await walk('c1');
  await handOff('mptcp', { from: 'c2', to: 'c1', serving: 1, last: next, next: last });
  await flows(client);
  await finish(client);
});

test(
  'a guest that is a copy takes an address of its own, and forgets the one in its memory',
  options,
  async () => {
    const take = async (place: Place) => {
      const step = { name: 'take', next: { ...place, mac: macs[0] }, idleMac: macs[1] } as const;
      const { argv, input } = guestRequest(step);
      requireDone('take', await inGuest(argv, input));
      const { interfaces } = await status();
      assert.deepEqual(
        interfaces.map(({ addresses }) => addresses),
        [[place.address], []],
      );
      assert.ok((await ping(lab, 'c2', hostOf(place), '-c', '3')).received > 0);
    };
    await take(placeAt('c1', 77));
    await take(placeAt('c1', 10));
  },
);

test(
  'a stretched LAN carries plain TCP there and back, and leads straight to the VM',
  options,
  async (context) => {
    await serve(context, probe);
    const last = placeAt('c1', 10);
    const client = await connect(context, probe, last);
    const { there, source, destination } = plansOf('stretch', 'c1', 'c2', 0, last);
    for (const step of destination.before) await doAt('c2', step.run);
    for (const step of source.before) await doAt('c1', step.run);
    await flows(client);
    await move('c1', 'c2', there);
    await flows(client);
    // Its home reaches it over the tunnel (as itself: the gateway's address is at both ends).
    assert.ok((await ping(lab, 'c1', hostOf(last), '-I', lab.site('c1').address, '-c', '3')).received > 0);
    await finish(client);

    await lab.move('phone', { to: 'c2' });
    const straight = await ping(lab, 'phone', hostOf(last), '-c', '5', '-i', '0.2');
    assert.ok(straight.received > 0 && straight.minMs < 18, JSON.stringify(straight));
    const onward = await connect(context, probe, last);
    await move('c2', 'c1', { ...there, continuity: 'none' });
    await undoAt('c1', undoesOf(source.before));
    await undoAt('c2', undoesOf(destination.before));
    await flows(onward);
    await finish(onward);
    assert.deepEqual(await devicesOfBoth(), [[], []]);
  },
);

test(
  'a host route carries plain TCP there and back, also from a neighbour in its LAN',
  options,
  async (context) => {
    await serve(context, probe);
    const last = placeAt('c1', 10);
    const client = await connect(context, probe, last);
    const { here, there, source, destination } = plansOf('host-route', 'c1', 'c2', 0, last);
    for (const step of destination.before) await doAt('c2', step.run);
    for (const step of source.before) await doAt('c1', step.run);
    await flows(client);
    await move('c1', 'c2', there);
    for (const action of source.turn) await doAt('c1', action);
    for (const action of destination.turn) await doAt('c2', action);
    await flows(client);
    const near = await ping(lab, 'c2', hostOf(last), '-c', '3', '-i', '0.2');
    assert.ok(near.received > 0 && near.minMs < 18, JSON.stringify(near));
    // The phone is at home, and the guest asks it for its MAC as if it still were.
    assert.ok((await ping(lab, 'phone', hostOf(last), '-c', '3', '-i', '0.2')).received > 0);
    await move('c2', 'c1', { ...there, continuity: 'none' });
    const { tunnel: _none, ...home } = here;
    for (const action of planDestination(home).turn) await doAt('c1', action);
    for (const action of planSource({ ...there, isAway: true }).turn) await doAt('c2', action);
    await flows(client);
    await undoAt('c1', undoesOf(source.before));
    await undoAt('c2', undoesOf(destination.before));
    await flows(client);
    await finish(client);
    assert.deepEqual(await devicesOfBoth(), [[], []]);
  },
);

test(
  'a guest under guard is heard with its own address only, and never with the MAC of another',
  options,
  async () => {
    const tap = tapName(vmId, 0);
    const last = placeAt('c1', 10);
    const guard = async (addresses: string[], mac: string = macs[0]) => {
      const [program, ...args] = planGuard(owner, { taps: [{ tap, mac, addresses }], tunnelRemotes: [] });
      await runAt('c1')(program, args);
    };
    const gateway = lab.site('c1').gateway;
    const heard = async () => {
      const { stdout } = await runIn(vm)('ping', ['-c', '1', '-W', '1', gateway]).catch((error) => error);
      return / 1 received/.test(String(stdout));
    };
    await until('the gateway', heard);
    await guard([hostOf(last)]);
    assert.ok(await heard());
    await guard(['10.1.0.99']);
    assert.equal(await heard(), false);
    await guard([hostOf(last)], '02:00:00:00:09:09');
    assert.equal(await heard(), false);
    for (const [program, ...args] of planGuardRemoval(owner)) await runAt('c1')(program, args);
    assert.ok(await heard());
  },
);

for (const mode of handoverModes)
  test(
    `Wi-Fi and cellular, mode ${mode}: the connection outlives a walk out of every LAN`,
    options,
    async (context) => {
      const { namespace, cellular, addressAt } = lab.device('tablet');
      const inTablet = lab.commandIn('tablet', mptcpMonitorCommand);
      using tablet = new MptcpDevice({
        run: (program, args) => runIn(namespace)(program, args),
        monitor: (each) => monitorLines(inTablet, each),
        mode,
        cellular: { device: 'cell0', address: cellular!.address },
      });
      const radio = (site: SiteName) => ({ device: 'wlan0', address: addressAt(lab.site(site)) });
      await lab.move('tablet', { to: 'c1' });
      await tablet.start(radio('c1'), signal);
      await serve(context, probeMptcp);
      const client = await connect(context, probeMptcp, placeAt('c1', 10), 'tablet');
      const overCellular = () => cameOver(cellular!.address);
      if (mode === 'single-path') assert.equal(await overCellular(), undefined);
      else await until('the cellular path', overCellular, (bytes) => bytes !== undefined);
      await flows(client);
      const [quiet, busy] = [(await overCellular()) ?? 0, await cameOver(radio('c1').address)];
      if (mode !== 'full') assert.ok(quiet < busy!, `${quiet} bytes over cellular, ${busy} over Wi-Fi`);

      await ip(namespace, 'link', 'set', 'dev', 'wlan0', 'down');
      await tablet.left(signal);
      await until('bytes over the cellular link', overCellular, (bytes) => (bytes ?? 0) > quiet);
      await flows(client);

      await lab.move('tablet', { to: 'c2' });
      assert.deepEqual(await tablet.arrived(radio('c2'), signal), { joined: 'yes' });
      await flows(client);
      if (mode === 'single-path')
        await until('the end of the cellular path', overCellular, (bytes) => bytes === undefined);
      await finish(client);
    },
  );
