/**
 * VMs follow devices between real daemons. All of them are on one machine here, where every round trip is alike: so the
 * devices tell of their LANs and RTTs themselves, and nothing is pinged. The lab's tests have the real distances.
 */
import assert from 'node:assert/strict';
import { readFile, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { after, before, test } from 'node:test';
import type { LabCloudlet, LabFleet } from '../../src/lab/fleet.ts';
import { MiB } from '../../src/model/units.ts';
import { connectNode, type Decision, type NodeViper } from '../../src/sdk/node.ts';
import { booted, done, importTiny, openFleet, refused, ticks, until, untilTicksPass } from './lab-vm.ts';

const options = { timeout: 900_000 };
const lanOf = (number: number) => [`127.${number}.0.0/16`];
const follow = (number: number, more: object = {}) => ({
  follow: { deviceRtt: 'reports', lans: lanOf(number), measureEveryMs: 1000, ...more },
});

let fleet: LabFleet;
let cloudlets: LabCloudlet[];
let one: LabCloudlet;
let two: LabCloudlet;
let three: LabCloudlet;
let vmId: string;
let token: string;

before(async () => {
  fleet = await openFleet();
  one = await fleet.add('one', follow(1));
  two = await fleet.add('two', follow(2));
  three = await fleet.add('three', follow(3, { mode: 'tell' }));
  cloudlets = [one, two, three];
  await importTiny(one.viper);
  const hardware = { memoryBytes: 128 * MiB, diskBytes: 64 * MiB };
  vmId = await done(
    one.viper,
    one.viper.createVm({ body: { name: 'web', image: 'tiny', instanceType: 'tiny', hardware } }),
  );
  await booted(one.viper, 'web');
}, options);
after(async () => {
  await fleet?.[Symbol.asyncDispose]();
});

async function deviceAt(cloudlet: LabCloudlet): Promise<NodeViper> {
  const ca = await readFile(cloudlet.caFile, 'utf8');
  return connectNode({ url: cloudlet.url, token, ca });
}

/** The device is in the LAN of one cloudlet: 2 ms from that one, 30 ms from the others. */
async function reportFrom(near: LabCloudlet, to: LabCloudlet) {
  await using device = await deviceAt(to);
  const number = cloudlets.indexOf(near) + 1;
  const rtts = cloudlets.map(({ id }) => ({ cloudletId: id, rttMs: id === near.id ? 2 : 30 }));
  return device.reportDevice({ body: { addresses: [`127.${number}.0.7`], rtts } });
}

const decisionsAt = async ({ viper }: LabCloudlet): Promise<Decision[]> =>
  (await viper.listDecisions({ query: { limit: 200 } })).items;

test('each cloudlet measures the way to each other, and knows its LANs', options, async () => {
  for (const { viper, id } of cloudlets) {
    const { items } = await until(
      'neighbours',
      () => viper.listNeighbours(),
      ({ items: each }) => each.length === 2 && each.every(({ standing }) => standing === 'neighbour'),
    );
    for (const { cloudletId, rttMs, lossRatio, lans } of items) {
      assert.ok(rttMs! < 150);
      assert.ok(lossRatio < 0.5);
      const number = cloudlets.findIndex((each) => each.id === cloudletId) + 1;
      assert.deepEqual(lans, lanOf(number));
    }
    assert.ok(items.every(({ cloudletId }) => cloudletId !== id));
  }
});

test('without a device, a VM stays, and the placement says why', options, async () => {
  const { outcome, reasons } = await one.viper.getPlacement({ params: { vm: 'web' } });
  assert.equal(outcome, 'stay');
  assert.match(reasons.join(), /No device/);
  await refused(one.viper.getPlacement({ params: { vm: 'nobody' } }), 'not_found');
});

test('a device is registered once, and a VM follows one device', options, async () => {
  const created = await one.viper.createDevice({ body: { name: 'phone', vm: 'web' } });
  token = created.secret;
  assert.deepEqual(created.device.vm, { id: vmId, name: 'web' });
  await refused(one.viper.createDevice({ body: { name: 'phone' } }), 'name_taken');
  await refused(one.viper.createDevice({ body: { name: 'other', vm: 'web' } }), 'in_use');
  await refused(one.viper.createDevice({ body: { name: 'other', vm: 'nobody' } }), 'not_found');
  await using device = await deviceAt(one);
  const { cloudlet, neighbours } = await device.getOwnDevice();
  assert.equal(cloudlet.id, one.id);
  assert.deepEqual(neighbours.map(({ name }) => name).toSorted(), ['three', 'two']);
  await refused(device.listVms(), 'forbidden');
  await using admin = connectNode({
    url: one.url,
    token: one.token,
    ca: await readFile(one.caFile, 'utf8'),
  });
  await refused(admin.getOwnDevice(), 'forbidden');
});

test('a device that stays keeps its VM, and the placement tells what would be', options, async () => {
  const { device } = await reportFrom(one, one);
  assert.deepEqual(device.lan, { id: one.id, name: 'one' });
  const { outcome, candidates, here } = await one.viper.getPlacement({ params: { vm: 'web' } });
  assert.equal(outcome, 'stay');
  assert.equal(here.deviceRttMs, 2);
  for (const { why } of candidates) assert.match(why, /30 ms from the device, wanted at most/);
  assert.deepEqual(await decisionsAt(one), []);
});

test(
  'a device that comes to the LAN of another cloudlet is followed by its VM, and told where it is',
  options,
  async () => {
    await using device = await deviceAt(one);
    const told = (async () => {
      for await (const { kind, data } of device.deviceEvents()) if (kind === 'device.vm-moved') return data;
      return undefined;
    })();
    const before = await ticks(one.viper, 'web');
    await reportFrom(two, one);
    const decision = await until(
      'the decision and what came of it',
      async () => (await decisionsAt(one))[0],
      (each) => each?.result !== undefined,
    );
    assert.deepEqual(
      [decision?.outcome, decision?.target?.name, decision?.trigger.kind, decision?.result?.moved],
      ['migrate', 'two', 'lan', true],
    );
    assert.equal(decision?.here.deviceRttMs, 30);
    const chosen = decision?.candidates.find(({ verdict }) => verdict === 'chosen');
    assert.ok(chosen?.forecast && chosen.forecast.totalMs > 0);
    assert.ok(decision?.result?.totalMs && decision.result.downtimeMs);
    await untilTicksPass(two.viper, 'web', before);
    assert.deepEqual((await told)?.cloudlet, { id: two.id, name: 'two', url: two.url });

    // At the old cloudlet the device learns where its VM is; with the same token it is known there.
    const { device: left } = await device.getOwnDevice();
    assert.deepEqual([left.vmIsHere, left.vmAt?.url], [false, two.url]);
    const { device: arrived } = await reportFrom(two, two);
    assert.deepEqual([arrived.vmIsHere, arrived.vm?.name, arrived.lan?.name], [true, 'web', 'two']);
  },
);

test('a device that goes back at once does not make its VM bounce', options, async () => {
  const back = await reportFrom(one, two);
  assert.equal(back.device.lan?.name, 'one');
  const { outcome, target } = await two.viper.getPlacement({ params: { vm: 'web' } });
  assert.deepEqual([outcome, target?.name], ['migrate', 'one'], 'it would, if it were asked now');
  await reportFrom(two, two);
  await reportFrom(one, two);
  assert.deepEqual(await decisionsAt(two), []);
  assert.equal((await two.viper.getVm({ params: { vm: 'web' } })).state, 'running');
});

test('finished migrations are the profile that forecasts learn from', options, async () => {
  const { items } = await one.viper.getProfile();
  assert.equal(items.length, 1);
  assert.equal(items[0]!.peerId, two.id);
  const { forecast } = await two.viper.planMigration({ params: { vm: 'web' }, body: { to: 'one' } });
  assert.ok(forecast);
});

test(
  'a VM that is moved by hand takes its device along; a cloudlet that only tells decides and moves nothing',
  options,
  async () => {
    await two.viper.wait(await two.viper.migrateVm({ params: { vm: 'web' }, body: { to: 'three' } }));
    const { device } = await reportFrom(three, three);
    assert.deepEqual([device.vmIsHere, device.name], [true, 'phone']);
    assert.equal((await three.viper.getDevice({ params: { device: 'phone' } })).vm?.name, 'web');
  },
);

test('a drained cloudlet gives the VM to the cloudlet that is nearest to its device', options, async () => {
  // Both have room; nobody can ping the device, so the one that is left must still take it.
  await three.viper.wait(await three.viper.drainCloudlet({ body: {} }));
  await three.viper.undrainCloudlet();
  const places = await Promise.all(
    [one, two].map(async ({ viper }) => (await viper.listVms({ query: {} })).items.map(({ name }) => name)),
  );
  assert.deepEqual(places.flat(), ['web']);
});

test(
  'where a migration would serve worse, a fresh VM begins there and the old one ends',
  options,
  async () => {
    const at = (await two.viper.listVms({ query: {} })).items.length > 0 ? two : one;
    const to = at === one ? two : one;
    const config = path.join(at.directory, 'config.json');
    const before = JSON.parse(await readFile(config, 'utf8'));
    // Every RTT counts as beyond what users bear.
    const strict = {
      ...before.follow,
      cooldownMs: 0,
      freshService: 'act',
      crispRttMs: 0.001,
      annoyingRttMs: 0.002,
    };
    // What was seen last before is acted upon at the start, and would send it to where the device was then.
    await reportFrom(at, at);
    await at.stop();
    await writeFile(config, JSON.stringify({ ...before, follow: strict }));
    await at.start();
    await until(
      'a neighbour',
      () => at.viper.listNeighbours(),
      ({ items }) =>
        items.some(({ cloudletId, standing }) => cloudletId === to.id && standing === 'neighbour'),
    );
    const [old] = (await at.viper.listVms({ query: {} })).items;
    await reportFrom(at, at);
    await reportFrom(to, at);
    const decision = await until(
      'the decision and what came of it',
      async () => (await decisionsAt(at)).at(-1),
      (each) => each?.outcome === 'fresh' && each.result !== undefined,
    );
    assert.equal(decision?.result?.moved, true, decision?.result?.message);
    await until(
      'the end of the old one',
      async () => (await at.viper.listVms({ query: {} })).items.length === 0,
    );
    const [fresh] = (await to.viper.listVms({ query: {} })).items;
    assert.equal(fresh?.name, 'web');
    assert.notEqual(fresh?.id, old?.id);
    const { device } = await reportFrom(to, to);
    assert.deepEqual([device.vm?.id, device.vmIsHere], [fresh?.id, true]);
    await using there = await deviceAt(at);
    assert.equal((await there.getOwnDevice()).device.vmAt?.url, to.url);
  },
);

test(
  'who is put out of the fleet by its founder is out everywhere, and no neighbour any more',
  options,
  async () => {
    await one.viper.removePeer({ params: { peer: three.id } });
    await until(
      'two to know',
      () => two.viper.listPeers(),
      ({ items }) => items.length === 1,
    );
    const { items } = await two.viper.listNeighbours();
    assert.deepEqual(
      items.map(({ name }) => name),
      ['one'],
    );
  },
);

test('a device that is deleted is known no more', options, async () => {
  const [at] = await Promise.all(
    [one, two].map(async (each) => ({ each, vms: (await each.viper.listVms({ query: {} })).items })),
  ).then((all) => all.filter(({ vms }) => vms.length > 0).map(({ each }) => each));
  await at!.viper.deleteDevice({ params: { device: 'phone' } });
  await using device = await deviceAt(at!);
  await refused(device.getOwnDevice(), 'unauthenticated');
  await refused(at!.viper.getDevice({ params: { device: 'phone' } }), 'not_found');
});
