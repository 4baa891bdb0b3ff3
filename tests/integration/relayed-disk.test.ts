/**
 * A VM whose disk is not shared leaves by way of relays that lend disk space: the source is killed when it has left, the
 * destination's daemon while the disk comes, and a relay is lost. What the guest had on its disk and what it writes
 * meanwhile is there all the same, also after it was started anew, and nothing is left anywhere.
 */
import assert from 'node:assert/strict';
import { existsSync } from 'node:fs';
import { readdir, readFile, stat } from 'node:fs/promises';
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
let fleet: LabFleet;
let north: LabCloudlet;
let south: LabCloudlet;
/** Of memory, and of disk space: so that the one can be held up without the other. */
let relays: LabCloudlet[];
let diskRelays: LabCloudlet[];

before(async () => {
  fleet = await openFleet();
  north = await fleet.add('north');
  south = await fleet.add('south');
  const add = (name: string, lends: object) => fleet.add(name, lends, { proxied: true });
  relays = [
    await add('r1', { relayMemoryBytes: 256 * MiB }),
    await add('r2', { relayMemoryBytes: 256 * MiB }),
  ];
  // The first says so in its config, the others are told.
  diskRelays = [await add('d1', { relayDiskBytes: 512 * MiB }), await add('d2', {}), await add('d3', {})];
  for (const { viper } of [north, south]) await importTiny(viper);
}, options);
after(async () => {
  await fleet?.[Symbol.asyncDispose]();
});

const usedBytes = (): Promise<number[]> =>
  Promise.all(diskRelays.map(async ({ viper }) => (await viper.getRelay()).disk.usedBytes));

/** MiB of the disk, behind all that its image has. */
const [old, changed, fresh] = [64, 72, 90];

/** What takes minutes is in `npm run test:relayed`. */
const isLong = process.env.VIPER_LONG_TESTS !== undefined;

test(
  'a disk leaves by way of relays, and is whole though source, destination and a relay die',
  options,
  async (context) => {
    const hardware = { memoryBytes: 128 * MiB, diskBytes: 128 * MiB };
    const body = { name: 'one', image: 'tiny', instanceType: 'tiny', hardware };
    const id = await done(north.viper, north.viper.createVm({ body }));
    await booted(north.viper, 'one');
    const one = { params: { vm: 'one' } };
    /** Of so many MiB as the disk has them. */
    const sumOf = ({ viper }: LabCloudlet, from: number, count: number) =>
      sh(
        viper,
        'one',
        `echo 3 >/proc/sys/vm/drop_caches; dd if=/dev/vda bs=256k skip=${from * 4} count=${count * 4} 2>/dev/null | md5sum`,
      );
    const write = ({ viper }: LabCloudlet, at: number, count: number) =>
      sh(
        viper,
        'one',
        `dd if=/dev/urandom of=/dev/vda bs=1M seek=${at} count=${count} conv=fsync,notrunc 2>/dev/null`,
      );
    await write(north, old, 12);
    const before = await sumOf(north, old, 8);
    const beginning = await sumOf(north, old, 0.25);
    // It writes on while it leaves; what it has read must be what it has written.
    await sh(
      north.viper,
      'one',
      '(while :; do head -c 65000 /dev/urandom >/dev/shm/w; dd if=/dev/shm/w of=/dev/vda bs=65000 seek=1680 count=1 ' +
        'conv=fsync,notrunc 2>/dev/null; echo 3 >/proc/sys/vm/drop_caches; ' +
        'dd if=/dev/vda bs=65000 skip=1680 count=1 2>/dev/null | cmp -s - /dev/shm/w || echo bad >>/run/bad; ' +
        'echo >>/run/turns; sleep 0.2; done) </dev/null >/dev/null 2>&1 &',
    );
    await diskRelays[1]!.viper.lendMemory({ body: { memoryBytes: 0, diskBytes: 512 * MiB } });
    for (const { link } of diskRelays) link!.limit({ outBytesPerSecond: 400_000 });
    const wanted = { to: 'south', engine: 'relayed' } as const;
    const operation = await north.viper.migrateVm({ ...one, body: wanted });
    const { result: moved } = await north.viper.wait(operation, { timeoutMs: patienceMs });
    const migration = { params: { migration: moved!.migrationId! } };
    const left = await north.viper.getMigration(migration);
    context.diagnostic(JSON.stringify(left.result));
    assert.deepEqual(
      left.options.relayed?.diskRelays?.map(({ name }) => name),
      ['d1', 'd2'],
    );
    assert.equal((await readdir(path.join(north.directory, 'vms'))).length, 0, 'nothing of it is left here');
    for (const { viper, directory } of diskRelays.slice(0, 2)) {
      const { disk, migrations } = await viper.getRelay();
      assert.ok(disk.usedBytes > 12 * MiB, `${disk.usedBytes} bytes of disk`);
      assert.deepEqual(
        migrations.map(({ holds }) => holds),
        ['disk'],
      );
      const [file] = await readdir(path.join(directory, 'relay'));
      assert.equal((await stat(path.join(directory, 'relay', file!))).mode & 0o777, 0o600);
    }
    await north.stop('SIGKILL');

    // It runs there, reads what it had, and writes, before its disk is there.
    const directory = directoryOf(south, id);
    const manifest = path.join(directory, 'disk-manifest');
    assert.equal((await stat(manifest)).mode & 0o777, 0o600);
    assert.ok(existsSync(path.join(directory, 'below.qcow2')), 'not all of it is here');
    await until(
      'the guest to read what it had',
      () => sumOf(south, old, 0.25),
      (sum) => sum === beginning,
    );
    const patient = (what: string, ask: () => Promise<string>) =>
      until(what, async () => ({ is: await ask() }));
    for (const at of [changed, fresh]) await patient('the guest to write', () => write(south, at, 1));
    const { is: after } = await patient('the guest to read', () => sumOf(south, changed, 1));
    const { is: written } = await patient('the guest to read', () => sumOf(south, fresh, 1));
    await refused(south.viper.stopVm({ ...one, body: { force: true } }), 'busy');
    await refused(south.viper.cloneVm({ ...one, body: { name: 'two' } }), 'busy');
    await refused(south.viper.migrateVm({ ...one, body: { to: 'r1' } }), 'busy');

    // What comes now takes a while, and the disk is not to be whole before.
    for (const { link } of diskRelays) link!.limit({ outBytesPerSecond: 100_000 });
    await south.stop('SIGKILL');
    await south.start();
    await diskRelays[0]!.stop('SIGKILL');
    assert.equal((await south.viper.getMigration(migration)).state, 'merging');
    assert.ok(existsSync(path.join(directory, 'below.qcow2')));
    for (const { link } of diskRelays) link!.limit({});
    await until(
      'the merge',
      () => south.viper.getMigration(migration),
      ({ over }) => over,
    );
    assert.equal((await south.viper.getMigration(migration)).state, 'settled');
    const verify = async (at: LabCloudlet) => {
      assert.equal(await sumOf(at, old, 8), before);
      assert.equal(await sumOf(at, changed, 1), after);
      assert.equal(await sumOf(at, fresh, 1), written);
    };
    await verify(south);
    await sh(south.viper, 'one', '[ ! -e /run/bad ]');
    const turns = Number(await sh(south.viper, 'one', 'wc -l </run/turns'));
    await until(
      'more turns of the guest',
      async () => Number(await sh(south.viper, 'one', 'wc -l </run/turns')),
      (now) => now > turns + 3,
    );

    // Its disk is like any other, and nothing is left of its way.
    for (const name of ['below.qcow2', 'disk-manifest', 'below.sock', 'lower.sock'])
      assert.ok(!existsSync(path.join(directory, name)), name);
    const head = (await readFile(path.join(directory, 'disk.qcow2'))).subarray(0, 4096).toString('latin1');
    assert.match(head, /\.\.\/\.\.\/images\//);
    await until(
      'the relay to forget',
      () => diskRelays[1]!.viper.getRelay(),
      ({ disk }) => disk.usedBytes === 0,
    );
    assert.deepEqual(await readdir(path.join(diskRelays[1]!.directory, 'relay')), []);

    if (!isLong) return;
    // It leaves in the same way again. A relay loses what it had when the VM runs there, so the source stays until others have
    // that; its QEMU dies while its disk comes, and what was there by then is there.
    await north.start();
    await diskRelays[0]!.start();
    await diskRelays[2]!.viper.lendMemory({ body: { memoryBytes: 0, diskBytes: 512 * MiB } });
    for (const { link } of relays) link!.limit({ inBytesPerSecond: 3_000_000 });
    for (const { link } of diskRelays) link!.limit({ outBytesPerSecond: 400_000 });
    const leaving = await south.viper.migrateVm({ ...one, body: { ...wanted, to: 'north' } });
    const { items } = await south.viper.listMigrations();
    const back = { params: { migration: items.at(-1)!.id } };
    await until(
      'the VM to run there',
      () => south.viper.getMigration(back),
      ({ state }) => state === 'serving',
    );
    const [first, second, lost] = await usedBytes();
    assert.ok(lost! > MiB, `${lost} bytes at the one that is lost`);
    await diskRelays[2]!.stop('SIGKILL');
    await diskRelays[2]!.start();
    for (const { link } of relays) link!.limit({});
    await south.viper.wait(leaving, { timeoutMs: patienceMs });
    const [firstNow, secondNow] = await usedBytes();
    assert.ok(firstNow! + secondNow! > first! + second! + lost!, 'what was lost is there twice again');
    assert.equal((await north.viper.getMigration(back)).state, 'merging');
    const { pid } = await north.viper.getVm(one);
    process.kill(pid!, 'SIGKILL');
    await refused(north.viper.startVm(one), 'busy');
    for (const { link } of diskRelays) link!.limit({});
    await until(
      'the rest of its disk',
      () => north.viper.getMigration(back),
      ({ over }) => over,
    );
    assert.deepEqual(
      (await readdir(directoryOf(north, id))).filter((name) => /qcow2|disk-manifest|below|lower/.test(name)),
      ['disk.qcow2'],
    );
    await done(north.viper, north.viper.startVm(one));
    await booted(north.viper, 'one');
    await verify(north);
  },
);
