/** VMs whose disk is on storage that two cloudlets have: only memory moves, and nobody loses a byte of the disk. */
import assert from 'node:assert/strict';
import { mkdir, mkdtemp, readdir, rm, stat } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, before, test } from 'node:test';
import type { LabCloudlet, LabFleet } from '../../src/lab/fleet.ts';
import { MiB } from '../../src/model/units.ts';
import type { MigrateVm, Migration } from '../../src/sdk/node.ts';
import { checked, startCheckers } from './checking-guest.ts';
import { assertGone, booted, done, importTiny, openFleet, patienceMs, refused, sh } from './lab-vm.ts';
import { StorageHost, whyNot } from './storage-servers.ts';

const options = { timeout: 900_000 };
const hardware = { memoryBytes: 128 * MiB, diskBytes: 64 * MiB };

let fleet: LabFleet;
let north: LabCloudlet;
let south: LabCloudlet;
let directory: string;
const made = new AsyncDisposableStack();
/** By storage: why it is not tried here. */
const missing: Record<string, string | undefined> = {};

before(async () => {
  directory = await mkdtemp(path.join(tmpdir(), 'viper-storage-'));
  made.defer(() => rm(directory, { recursive: true, force: true }));
  missing.nas = await whyNot('ganesha.nfsd', 'nfs');
  missing.cluster = await whyNot('glusterd', 'gluster');
  const host = missing.nas && missing.cluster ? undefined : made.use(await StorageHost.make());
  for (const each of ['mounted', 'mine', 'nfs', 'gluster']) await mkdir(path.join(directory, each));
  const storages = [
    { name: 'mounted', path: path.join(directory, 'mounted') },
    ...(missing.nas ? [] : [{ name: 'nas', url: await host!.serveNfs(path.join(directory, 'nfs')) }]),
    ...(missing.cluster
      ? []
      : [{ name: 'cluster', url: await host!.serveGluster(path.join(directory, 'gluster')) }]),
  ];
  fleet = made.use(await openFleet());
  north = await fleet.add('north', {
    storages: [...storages, { name: 'mine', path: path.join(directory, 'mine') }],
  });
  south = await fleet.add('south', { storages });
  await importTiny(north.viper);
}, options);
after(() => made.disposeAsync(), options);

async function make(name: string, storage: string): Promise<string> {
  const body = { name, image: 'tiny', instanceType: 'tiny', hardware, storage };
  const id = await done(north.viper, north.viper.createVm({ body }));
  await booted(north.viper, name);
  await startCheckers(guestAt(north, name));
  return id;
}

/** The guest as the checkers of a guest want it. */
function guestAt({ viper }: LabCloudlet, vm: string): Parameters<typeof checked>[0] {
  const exec = (body: { argv: string[] }) => viper.execInGuest({ params: { vm }, body });
  return { agent: { exec } } as unknown as Parameters<typeof checked>[0];
}
const verified = (at: LabCloudlet, vm: string) => checked(guestAt(at, vm), { memory: 24, disk: 13 });

async function move(
  vm: string,
  from: LabCloudlet,
  to: LabCloudlet,
  how: Partial<MigrateVm> = {},
): Promise<Migration> {
  const operation = await from.viper.migrateVm({ params: { vm }, body: { to: to.name, ...how } });
  const ended = await from.viper.wait(operation, { timeoutMs: patienceMs });
  return from.viper.getMigration({ params: { migration: ended.result!.migrationId! } });
}

const remove = (at: LabCloudlet, vm: string) =>
  done(at.viper, at.viper.deleteVm({ params: { vm }, query: { force: true } }));

test(
  'a VM on a mounted directory moves there and back without its disk, which stays where it is',
  options,
  async (context) => {
    const id = await make('one', 'mounted');
    const file = path.join(directory, 'mounted', `viper-${id}.qcow2`);
    const inode = (await stat(file)).ino;
    // Slow enough for QEMU to tell how fast the guest dirties its memory.
    const there = await move('one', north, south, {
      engine: 'direct',
      limits: { bandwidthBps: 400_000_000 },
    });
    assert.deepEqual([there.options.storage, there.result?.diskBytes], ['shared', 0]);
    const { memoryBytes, dirtyBps, maxDirtyBps, link, source, destination, linkUsePercent } = there.result!;
    assert.ok(memoryBytes > 0 && dirtyBps > 0 && maxDirtyBps! >= dirtyBps, JSON.stringify(there.result));
    assert.ok(link!.sentBytes >= memoryBytes && link!.rateBps > 0 && linkUsePercent! > 0);
    assert.ok(source!.daemonCpuMs > 0 && source!.qemuCpuMs > 0);
    assert.ok(destination!.daemonCpuMs > 0 && destination!.qemuCpuMs > 0);
    context.diagnostic(JSON.stringify(there.result));
    // It has everything with it: the image was never sent.
    assert.deepEqual((await south.viper.listImages()).items, []);
    await verified(south, 'one');
    assert.equal((await stat(file)).ino, inode);
    assert.deepEqual((await north.viper.listVms()).items, []);
    assert.deepEqual(await readdir(path.join(north.directory, 'vms')), []);
    await move('one', south, north, { mode: 'hybrid' });
    await verified(north, 'one');
    const { spec } = await north.viper.getVm({ params: { vm: 'one' } });
    assert.equal(spec.disk.storage, 'mounted');
  },
);

test(
  'a clone of it has a disk of its own on the same storage, with what was in memory',
  options,
  async () => {
    const clone = { params: { vm: 'one' }, body: { name: 'two' } };
    const id = await done(north.viper, north.viper.cloneVm(clone));
    await verified(north, 'two');
    await move('two', north, south);
    await verified(south, 'two');
    await verified(north, 'one');
    await remove(south, 'two');
    assert.ok(!(await readdir(path.join(directory, 'mounted'))).includes(`viper-${id}.qcow2`));
  },
);

test(
  'where the storage is missing the disk is copied as a whole, and then leaves the storage',
  options,
  async () => {
    const id = await make('three', 'mine');
    const shared = { to: 'south', storage: 'shared' } as const;
    const error = await refused(
      north.viper.migrateVm({ params: { vm: 'three' }, body: shared }),
      'migration_refused',
    );
    assert.match(error.message, /There is no storage 'mine'/);
    const there = await move('three', north, south);
    assert.equal(there.options.storage, 'copied');
    assert.ok(there.result!.diskBytes > 0);
    await verified(south, 'three');
    const { spec } = await south.viper.getVm({ params: { vm: 'three' } });
    assert.equal(spec.disk.storage, undefined);
    assert.deepEqual(await readdir(path.join(directory, 'mine')), []);
    await remove(south, 'three');
    await assertGone(south, id);
  },
);

test('deleting a VM removes its disk from the storage', options, async () => {
  await remove(north, 'one');
  assert.deepEqual(await readdir(path.join(directory, 'mounted')), []);
});

test('a cloudlet has no storage but those of its config', options, async () => {
  const body = { name: 'four', image: 'tiny', instanceType: 'tiny', storage: 'nowhere' };
  const error = await refused(north.viper.createVm({ body }), 'unsupported');
  assert.match(error.message, /no storage 'nowhere'/);
});

for (const [storage, files] of [
  ['nas', 'nfs/export'],
  ['cluster', 'gluster/brick'],
] as const) {
  test(
    `a VM moves with its disk on a server that QEMU itself speaks to: ${files.split('/')[0]}`,
    options,
    async (context) => {
      if (missing[storage]) return context.skip(missing[storage]);
      const id = await make(storage, storage);
      const file = path.join(directory, files, `viper-${id}.qcow2`);
      assert.ok((await stat(file)).size > 0);
      // From the disk into the page cache: the destination, which lacks the image, reads that from the storage itself.
      // Not what lies behind, which the guest writes all the time.
      await sh(north.viper, storage, 'dd if=/dev/vda of=/dev/null bs=1M count=32');
      const there = await move(storage, north, south, { engine: 'condensed' });
      context.diagnostic(JSON.stringify(there.result));
      assert.deepEqual([there.options.storage, there.result?.diskBytes], ['shared', 0]);
      assert.ok(there.result!.condensed!.pages.set > 100, 'pages of the disk');
      await verified(south, storage);
      await move(storage, south, north, { channels: 2 });
      await verified(north, storage);
      await remove(north, storage);
      // QEMU's tools cannot remove it there, so it is emptied.
      assert.equal((await stat(file)).size, 0);
    },
  );
}
