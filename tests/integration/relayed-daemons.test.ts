/**
 * The relayed engine between real daemons: a VM and its clone leave at once, and what they have in common goes to relays
 * once. The source is killed when they have left, the destination while it merges, and a relay is lost; the guests verify
 * their memory all the same, and nothing is left anywhere. Then a host is drained by a deadline, for which it takes relays by
 * itself.
 */
import assert from 'node:assert/strict';
import { readdir, stat } from 'node:fs/promises';
import path from 'node:path';
import { after, before, test } from 'node:test';
import type { LabCloudlet, LabFleet } from '../../src/lab/fleet.ts';
import { MiB } from '../../src/model/units.ts';
import {
  booted,
  directoryOf,
  done,
  importTiny,
  openFleet,
  patienceMs,
  refused,
  sh,
  until,
} from './lab-vm.ts';

const options = { timeout: 600_000 };
const isLong = process.env.VIPER_LONG_TESTS !== undefined;
let fleet: LabFleet;
let north: LabCloudlet;
let south: LabCloudlet;
let relays: LabCloudlet[];

before(async () => {
  fleet = await openFleet();
  north = await fleet.add('north');
  south = await fleet.add('south', {}, { proxied: true });
  // The first says so in its config, the others are told.
  const lends = { relayMemoryBytes: 256 * MiB };
  relays = [await fleet.add('r1', lends, { proxied: true })];
  for (const name of ['r2', 'r3']) relays.push(await fleet.add(name, {}, { proxied: true }));
  for (const { viper } of [north, south]) await importTiny(viper);
}, options);
after(async () => {
  await fleet?.[Symbol.asyncDispose]();
});

test(
  'VMs leave by way of relays, and are whole though source, destination and a relay die',
  options,
  async (context) => {
    const hardware = { memoryBytes: 128 * MiB, diskBytes: 64 * MiB };
    const body = { name: 'one', image: 'tiny', instanceType: 'tiny', hardware, tenant: 'ann' };
    const id = await done(north.viper, north.viper.createVm({ body }));
    await booted(north.viper, 'one');
    await sh(
      north.viper,
      'one',
      'head -c 16777216 /dev/urandom >/dev/shm/own; md5sum /dev/shm/own >/run/own',
    );
    await done(north.viper, north.viper.cloneVm({ params: { vm: 'one' }, body: { name: 'twin' } }));
    await booted(north.viper, 'twin');
    await sh(
      north.viper,
      'one',
      '(while :; do head -c 65536 /dev/urandom >/dev/shm/hot; md5sum </dev/shm/hot >/run/hot; ' +
        'md5sum </dev/shm/hot | cmp -s - /run/hot || echo bad >>/run/bad; echo >>/run/turns; done) </dev/null >/dev/null 2>&1 &',
    );
    const wanted = { to: 'south', engine: 'relayed' } as const;
    const one = { params: { vm: 'one' } };

    // With one relay there is no second replica.
    const refusal = await refused(north.viper.migrateVm({ ...one, body: wanted }), 'migration_refused');
    assert.match(refusal.message, /Of 3 peers 1 lend memory now/);
    for (const { viper } of relays.slice(1)) await viper.lendMemory({ body: { memoryBytes: 256 * MiB } });
    await refused(north.viper.migrateVm({ ...one, body: { ...wanted, mode: 'precopy' } }), 'invalid_request');

    // Nor can the host be empty in a second, which is said before anything is done.
    const late = await refused(
      north.viper.drainCloudlet({ body: { deadlineMs: 1000 } }),
      'migration_refused',
    );
    assert.match(late.message, /Cannot drain in 1000 ms: as far as is known now it takes \d+ ms/);
    assert.equal((await north.viper.getCloudlet()).draining, false);

    // The destination takes little, and relays give it slowly.
    south.link!.limit({ inBytesPerSecond: 1_000_000 });
    for (const { link } of relays) link!.limit({ outBytesPerSecond: 1_500_000 });
    const begun = ['one', 'twin'].map((vm) => north.viper.migrateVm({ params: { vm }, body: wanted }));
    const migrations = await Promise.all(
      begun.map(async (operation) => {
        const { result: moved } = await north.viper.wait(await operation, { timeoutMs: patienceMs });
        return { params: { migration: moved!.migrationId! } };
      }),
    );
    const [migration] = migrations as [(typeof migrations)[0]];
    const [result, ofTwin] = await Promise.all(
      migrations.map(async (each) => (await north.viper.getMigration(each)).result!),
    );
    context.diagnostic(JSON.stringify([result, ofTwin]));
    const divisions = [result!.relayed!, ofTwin!.relayed!];
    const slabs = divisions.reduce((sum, each) => sum + each.slabs, 0);
    const shared = divisions.reduce((sum, { borrowedPages = 0 }) => sum + borrowedPages, 0);
    assert.ok(slabs > 50, `${slabs} slabs`);
    // Of 16 MB, as far as they did not go to the destination by themselves.
    assert.ok(shared > 2000, `${shared} pages`);
    assert.equal(result!.merge, undefined, 'it is not whole yet');
    assert.equal((await readdir(path.join(north.directory, 'vms'))).length, 0, 'nothing of it is left here');
    const exited = await until('its exit', async () => {
      for await (const event of north.viper.events({ after: 0 }))
        if (event.kind === 'migration.exited' && event.vmId === id) return event;
      return undefined;
    });
    assert.equal(exited!.data.exitMs, Math.round(result!.exitMs!));
    await north.stop('SIGKILL');

    // It runs, and goes on to merge after its daemon was killed.
    assert.equal((await south.viper.getMigration(migration)).state, 'merging');
    const manifest = path.join(directoryOf(south, id), 'manifest');
    assert.equal((await stat(manifest)).mode & 0o777, 0o600);
    await south.stop('SIGKILL');
    await south.start();
    const seen = await south.viper.getMigration(migration);
    assert.equal(seen.state, 'merging');
    assert.equal(seen.options.relayed!.diskRelays, undefined, 'they lend no disk space');
    await relays[0]!.stop('SIGKILL');
    for (const { link } of [south, ...relays]) link!.limit({});
    for (const each of migrations) {
      await until(
        'the merge',
        () => south.viper.getMigration(each),
        ({ over }) => over,
      );
      assert.equal((await south.viper.getMigration(each)).state, 'settled');
    }
    assert.equal((await south.viper.getVm(one)).state, 'running');
    assert.equal((await south.viper.getVm(one)).tenant, 'ann');
    await sh(south.viper, 'one', 'md5sum -c /run/own && [ ! -e /run/bad ]');
    await sh(south.viper, 'twin', 'md5sum -c /run/own');
    const turns = Number(await sh(south.viper, 'one', 'wc -l </run/turns'));
    await until(
      'more turns of the guest',
      async () => Number(await sh(south.viper, 'one', 'wc -l </run/turns')),
      (now) => now > turns + 20,
    );
    await refused(
      north.start().then(() => north.viper.getVm(one)),
      'not_found',
    );

    // Nothing is left: neither a manifest nor a slab.
    await assert.rejects(stat(manifest), { code: 'ENOENT' });
    for (const { viper } of relays.slice(1))
      await until(
        'the relays to forget',
        () => viper.getRelay(),
        ({ usedBytes }) => usedBytes === 0,
      );
  },
);

test('a host is empty by its deadline, by way of relays, for its destination takes too little', {
  ...options,
  skip: isLong ? false : 'it takes minutes: npm run test:relayed',
}, async (context) => {
  await relays[0]!.start();
  // Room for two replicas of all that their QEMUs have in use.
  for (const { viper } of relays) await viper.lendMemory({ body: { memoryBytes: 512 * MiB } });
  // What it learns by this one: how little south takes. How much can leave it knows by the one that went to relays.
  south.link!.limit({ inBytesPerSecond: 1_500_000 });
  const hardware = { memoryBytes: 128 * MiB, diskBytes: 64 * MiB };
  const make = async (name: string) => {
    const body = { name, image: 'tiny', instanceType: 'tiny', hardware, tenant: 'ann' };
    await done(north.viper, north.viper.createVm({ body }));
    await booted(north.viper, name);
  };
  await make('scout');
  await done(north.viper, north.viper.migrateVm({ params: { vm: 'scout' }, body: { to: 'south' } }));
  for (const name of ['two', 'three']) {
    await make(name);
    const fill = 'head -c 8388608 /dev/urandom >/dev/shm/own; md5sum /dev/shm/own >/run/own';
    await sh(north.viper, name, fill);
  }

  const deadlineMs = 180_000;
  const body = { deadlineMs, to: ['south'] };
  const begunAt = Date.now();
  const { result } = await north.viper.wait(await north.viper.drainCloudlet({ body }), {
    timeoutMs: patienceMs,
  });
  assert.deepEqual(result!.moved!.split(' ').toSorted(), ['three', 'two']);
  assert.deepEqual(await readdir(path.join(north.directory, 'vms')), []);
  const { items } = await north.viper.listMigrations();
  for (const { vm, options: used, result: came } of items.slice(-2)) {
    context.diagnostic(`${vm.name}: ${JSON.stringify(came)}`);
    assert.equal(used.engine, 'relayed', vm.name);
    assert.ok(came!.relayed!.slabs > 20, `${came!.relayed!.slabs} slabs`);
  }
  const shared = items.slice(-2).map(({ result: came }) => came!.relayed!.borrowedPages ?? 0);
  assert.ok(Math.max(...shared) > 0, `${shared} pages: both have the same kernel`);
  const exits: number[] = [];
  for await (const event of north.viper.events({ after: 0 })) {
    if (event.kind === 'migration.exited' && Date.parse(event.at) >= begunAt)
      exits.push(Date.parse(event.at));
    if (exits.length === 2) break;
  }
  assert.ok(Math.max(...exits) - begunAt <= deadlineMs, 'it was empty by then');
  // Not by the time at which both are whole, which comes later.
  await north.stop('SIGKILL');
  south.link!.limit({});
  for (const { id } of items.slice(-2))
    await until(
      'the merge',
      () => south.viper.getMigration({ params: { migration: id } }),
      ({ over }) => over,
    );
  for (const name of ['two', 'three']) await sh(south.viper, name, 'md5sum -c /run/own');
});
