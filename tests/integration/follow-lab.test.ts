/**
 * A device walks through a lab, and its VM follows: the distances are real here. First a device that says nothing, which
 * cloudlets find by its card and by ping; then one that runs `viper device run`.
 */
import assert from 'node:assert/strict';
import { type ChildProcess, execFile, spawn } from 'node:child_process';
import { once } from 'node:events';
import path from 'node:path';
import { createInterface } from 'node:readline';
import { after, before, test } from 'node:test';
import { promisify } from 'node:util';
import { type LabCloudlet, LabFleet } from '../../src/lab/fleet.ts';
import { Lab } from '../../src/lab/lab.ts';
import { newMac } from '../../src/model/ids.ts';
import { MiB } from '../../src/model/units.ts';
import type { Decision } from '../../src/sdk/node.ts';
import { booted, done, importTiny, until } from './lab-vm.ts';
import { labName, skip } from './lab-world.ts';

const options = { skip, timeout: 900_000 };
const launcher = path.resolve(import.meta.dirname, '../../bin/viper');
const config = {
  follow: { measureEveryMs: 2000, watchEveryMs: 200, cooldownMs: 3000, askDeadlineMs: 2000 },
};

let lab: Lab;
let fleet: LabFleet;
let c1: LabCloudlet;
let c2: LabCloudlet;
let token: string;

if (!skip) {
  before(async () => {
    lab = await Lab.up({
      name: labName('f'),
      cloudlets: ['c1', 'c2'],
      devices: [{ name: 'phone', at: 'c1' }],
      wan: { rttMs: 40 },
    });
    fleet = await LabFleet.create(lab);
    c1 = await fleet.add('c1', config);
    c2 = await fleet.add('c2', config);
    await importTiny(c1.viper);
    const mac = newMac();
    const body = {
      name: 'web',
      image: 'tiny',
      instanceType: 'tiny',
      hardware: { memoryBytes: 128 * MiB, diskBytes: 64 * MiB, nets: [{ network: 'lan', mac }] },
      seed: { addresses: [{ mac, address: '10.1.0.10/24', gateway: '10.1.0.1' }] },
    };
    await done(c1.viper, c1.viper.createVm({ body }));
    await booted(c1.viper, 'web');
  }, options);
  after(async () => {
    await fleet?.[Symbol.asyncDispose]();
    await lab?.[Symbol.asyncDispose]();
  });
}

const addressAt = (site: string): string => lab.device('phone').addressAt(lab.site(site));

async function decisions({ viper }: LabCloudlet): Promise<Decision[]> {
  return (await viper.listDecisions({ query: { limit: 200 } })).items;
}

/** The decision at a cloudlet that moved the VM, once it is over. */
const followed = (at: LabCloudlet): Promise<Decision> =>
  until(
    `the VM to leave ${at.name}`,
    async () => (await decisions(at)).findLast(({ result }) => result?.moved === true)!,
    (decision) => decision !== undefined,
  );

async function inPhone(...argv: [string, ...string[]]): Promise<void> {
  const [program, ...args] = lab.commandIn('phone', argv);
  await promisify(execFile)(program, args, { timeout: 60_000 });
}

interface Said {
  kind: string;
  at: string;
  lan?: string;
  cloudlet?: string;
}

/** `viper device run` in the phone; `at`: the cloudlet that it knows first. */
function startCompanion(at: LabCloudlet): { events: Said[] } & AsyncDisposable {
  const options = ['--json', '--no-mptcp', '--url', at.url, '--ca', at.caFile, '--radio', 'wlan0'];
  const [program, ...args] = lab.commandIn('phone', [launcher, 'device', 'run', ...options]);
  const env = { ...process.env, VIPER_TOKEN: token };
  const child: ChildProcess = spawn(program, args, { stdio: ['ignore', 'pipe', 'inherit'], env });
  const events: Said[] = [];
  createInterface({ input: child.stdout! }).on('line', (line) => events.push(JSON.parse(line)));
  const dispose = async () => {
    child.kill('SIGTERM');
    if (child.exitCode === null && child.signalCode === null) await once(child, 'exit');
  };
  return { events, [Symbol.asyncDispose]: dispose };
}

test('neighbours know the round trip of the WAN and the LANs behind it', options, async () => {
  const { items } = await until(
    'a neighbour',
    () => c1.viper.listNeighbours(),
    ({ items: each }) => each[0]?.standing === 'neighbour' && each[0].samples >= 8,
  );
  const [neighbour] = items;
  assert.deepEqual(neighbour!.lans, ['10.2.0.0/24']);
  // The link takes 40 ms; a busy machine makes it longer, never shorter.
  assert.ok(neighbour!.minMs! >= 36, JSON.stringify(neighbour));
});

test('a device that says nothing is missed, found by its card, and followed', options, async () => {
  const { mac } = lab.device('phone');
  const created = await c1.viper.createDevice({
    body: { name: 'phone', vm: 'web', macs: [mac], addresses: [addressAt('c1')] },
  });
  token = created.secret;
  await until(
    'a round trip to the device',
    () => c1.viper.getDevice({ params: { device: 'phone' } }),
    ({ rttMs }) => rttMs !== undefined,
  );
  const { outcome } = await c1.viper.getPlacement({ params: { vm: 'web' } });
  assert.equal(outcome, 'stay');

  await lab.move('phone', { to: 'c2', gapMs: 200 });
  // It uses its new LAN, so that somebody can see it there.
  await inPhone('ping', '-c', '1', lab.site('c2').gateway);
  const decision = await followed(c1);
  assert.deepEqual(
    [decision.outcome, decision.target?.name, decision.trigger.kind],
    ['migrate', 'c2', 'lost'],
  );
  const [candidate] = decision.candidates;
  assert.ok(candidate!.seesDevice);
  assert.ok(candidate!.deviceRttMs! < candidate!.neighbourRttMs!, JSON.stringify(candidate));
  assert.equal((await c2.viper.getVm({ params: { vm: 'web' } })).state, 'running');
  const device = await until(
    'a round trip from the new place',
    () => c2.viper.getDevice({ params: { device: 'phone' } }),
    ({ rttMs }) => rttMs !== undefined,
  );
  assert.deepEqual([device.vmIsHere, device.addresses[0]], [true, addressAt('c2')]);
});

test('a device that runs the companion is followed at once, and told where its VM is', options, async (t) => {
  await using companion = startCompanion(c2);
  const { events } = companion;
  await until('the first report', () => events.some(({ kind, lan }) => kind === 'reported' && lan === 'c2'));
  await lab.move('phone', { to: 'c1', gapMs: 200 });
  const decision = await followed(c2);
  const { outcome, target, trigger } = decision;
  assert.deepEqual([outcome, target?.name, trigger.kind], ['migrate', 'c1', 'lan']);
  await until('the word that the VM is at c1', () =>
    events.some(({ kind, cloudlet }) => kind === 'vm-at' && cloudlet === 'c1'),
  );
  assert.equal((await c1.viper.getVm({ params: { vm: 'web' } })).state, 'running');
  const arrived = events.find(({ kind }) => kind === 'arrived')!;
  const operation = await c2.viper.getOperation({ params: { operation: decision.operationId! } });
  const startedMs = Date.parse(operation.createdAt) - Date.parse(arrived.at);
  t.diagnostic(`attached to started: ${startedMs} ms, of it decided in ${decision.tookMs} ms`);
  // The VM is near again, and everybody agrees.
  assert.equal((await c1.viper.getPlacement({ params: { vm: 'web' } })).outcome, 'stay');
});

test('a device that goes back in mid-handoff has its VM beside it in the end', options, async () => {
  // The phone is at c1 with its VM; it walks to c2, and back while the VM is on its way.
  const before = (await decisions(c1)).length;
  await using companion = startCompanion(c1);
  await until('a report from c1', () => companion.events.some(({ lan }) => lan === 'c1'));
  await lab.move('phone', { to: 'c2', gapMs: 100 });
  await until('a VM on its way', async () => (await decisions(c1)).slice(before).some(({ acted }) => acted));
  await lab.move('phone', { to: 'c1', gapMs: 100 });
  await until('the VM at c1 and the device beside it', async () => {
    const vm = await c1.viper.getVm({ params: { vm: 'web' } });
    const { vmIsHere, lan } = await c1.viper.getDevice({ params: { device: 'phone' } });
    // What has begun and is not over may yet take it away.
    return vm.state === 'running' && !vm.operationId && vmIsHere && lan?.name === 'c1';
  });
  await booted(c1.viper, 'web');
});

test('a device that disappears leaves its VM where it is', options, async () => {
  const before = (await decisions(c1)).length;
  const [program, ...args] = lab.commandIn('phone', ['ip', 'link', 'set', 'wlan0', 'down']);
  await promisify(execFile)(program, args);
  await until(
    'nothing but losses',
    () => c1.viper.getDevice({ params: { device: 'phone' } }),
    ({ lossRatio }) => lossRatio !== undefined && lossRatio > 0.5,
  );
  // What the neighbour measured before is good for a while.
  const { outcome } = await until(
    'a neighbour that does not reach it either',
    () => c1.viper.getPlacement({ params: { vm: 'web' } }),
    ({ candidates }) => /does not reach the device/.test(candidates[0]!.why),
  );
  assert.equal(outcome, 'stay');
  assert.equal((await c1.viper.getVm({ params: { vm: 'web' } })).state, 'running');
  assert.equal((await decisions(c1)).length, before);
});

test('a neighbour behind a cut WAN is silent after a while, and no VM goes there', options, async () => {
  await lab.link('c1', 'c2', { isCut: true });
  await until(
    'silence',
    () => c1.viper.listNeighbours(),
    ({ items }) => items[0]?.standing === 'silent',
  );
  const { outcome, candidates } = await c1.viper.getPlacement({ params: { vm: 'web' } });
  assert.deepEqual([outcome, candidates[0]!.verdict], ['stay', 'excluded']);
  await lab.link('c1', 'c2', { isCut: false });
  await until(
    'the neighbour',
    () => c1.viper.listNeighbours(),
    ({ items }) => items[0]?.standing === 'neighbour',
  );
});
