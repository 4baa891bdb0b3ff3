/**
 * A VM whose source has left, and whose destination is lost before it is whole, goes on at its custodian as it left, with
 * the disk of that moment; the destination that comes back finds out, and does not run it. It takes minutes.
 */
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { mkdir, mkdtemp, readdir, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, before, test } from 'node:test';
import { promisify } from 'node:util';
import type { LabCloudlet, LabFleet } from '../../src/lab/fleet.ts';
import { MiB } from '../../src/model/units.ts';
import { checked, startCheckers } from '../integration/checking-guest.ts';
import {
  assertWhole,
  booted,
  done,
  importTiny,
  openFleet,
  patienceMs,
  refused,
  sh,
  until,
} from '../integration/lab-vm.ts';

const options = { timeout: 600_000 };
const one = { params: { vm: 'one' } };
let fleet: LabFleet;
let north: LabCloudlet;
let south: LabCloudlet;
let east: LabCloudlet;
let relays: LabCloudlet[];
const made = new AsyncDisposableStack();
let storage: string;

before(async () => {
  storage = await mkdtemp(path.join(tmpdir(), 'viper-custodian-'));
  made.defer(() => rm(storage, { recursive: true, force: true }));
  await mkdir(path.join(storage, 'mounted'));
  fleet = made.use(await openFleet());
  const storages = [{ name: 'mounted', path: path.join(storage, 'mounted') }];
  north = await fleet.add('north', { storages });
  south = await fleet.add('south', { storages }, { proxied: true });
  east = await fleet.add('east', { storages });
  const lends = { relayMemoryBytes: 256 * MiB };
  relays = [await fleet.add('r1', lends, { proxied: true }), await fleet.add('r2', lends, { proxied: true })];
  for (const { viper } of [north, east]) await importTiny(viper);
}, options);
after(() => made.disposeAsync(), options);

/** The guest as the checkers of a guest want it. */
function guestAt({ viper }: LabCloudlet): Parameters<typeof checked>[0] {
  const exec = (body: { argv: string[] }) => viper.execInGuest({ ...one, body });
  return { agent: { exec } } as unknown as Parameters<typeof checked>[0];
}

const diskOf = (id: string) => path.join(storage, 'mounted', `viper-${id}.qcow2`);

async function snapshotsOf(id: string): Promise<string> {
  const { stdout } = await promisify(execFile)('qemu-img', ['snapshot', '-U', '-l', diskOf(id)]);
  return stdout;
}

test('an operator claims a VM at its custodian when its destination is lost', options, async (context) => {
  const hardware = { memoryBytes: 128 * MiB, diskBytes: 64 * MiB };
  const body = { name: 'one', image: 'tiny', instanceType: 'tiny', hardware, storage: 'mounted' };
  const id = await done(north.viper, north.viper.createVm({ body }));
  await booted(north.viper, 'one');
  await startCheckers(guestAt(north));
  await sh(north.viper, 'one', 'head -c 4194304 /dev/urandom >/dev/shm/own; md5sum /dev/shm/own >/run/own');

  const wanted = { to: 'south', custodian: 'east' };
  for (const wrong of [{ custodian: 'south' }, { engine: 'condensed' as const }, { relays: ['east', 'r1'] }])
    await refused(north.viper.migrateVm({ ...one, body: { ...wanted, ...wrong } }), 'invalid_request');
  const noDisk = await refused(
    north.viper.migrateVm({ ...one, body: { ...wanted, custodian: 'r1' } }),
    'migration_refused',
  );
  assert.match(noDisk.message, /At r1, its custodian/);

  // It leaves by way of relays, and has little of its memory when it runs at south.
  south.link!.limit({ inBytesPerSecond: 1_000_000 });
  for (const { link } of relays) link!.limit({ outBytesPerSecond: 500_000 });
  const operation = await north.viper.migrateVm({ ...one, body: wanted });
  const { result: moved } = await north.viper.wait(operation, { timeoutMs: patienceMs });
  const migration = moved!.migrationId!;
  const { result } = await north.viper.getMigration({ params: { migration } });
  context.diagnostic(JSON.stringify(result));
  assert.equal((await readdir(path.join(north.directory, 'vms'))).length, 0, 'the source holds nothing');
  await north.stop('SIGKILL');
  const [held] = (await east.viper.listEscrows()).items;
  assert.deepEqual([held?.migrationId, held?.vm.id, held?.state], [migration, id, 'held']);
  assert.match(await snapshotsOf(id), new RegExp(migration));

  // What it does there is gone if it is lost.
  await until('a file of south on the disk', () =>
    sh(south.viper, 'one', 'echo late >/data/late; sync; echo there'),
  );
  assert.equal((await south.viper.getMigration({ params: { migration } })).state, 'merging');
  const claim = { params: { migration }, body: { vm: 'one', reason: 'south burnt down' } };
  const early = await refused(east.viper.claimEscrow(claim), 'wrong_state');
  assert.match(early.message, /from south, which has it: the daemon at south answers/);
  await refused(east.viper.claimEscrow({ ...claim, body: { ...claim.body, vm: 'two' } }), 'not_found');

  // Only its daemon is lost: the VM runs on, and the lock of its disk says so.
  const { pid } = await south.viper.getVm(one);
  await south.stop('SIGKILL');
  // It has asked whose the VM is until a moment ago.
  const begun = await until('south to be missed', () => east.viper.claimEscrow(claim));
  const running = await refused(east.viper.wait(begun, { timeoutMs: patienceMs }), 'in_use');
  assert.match(running.message, /is open somewhere/);
  assert.deepEqual(await readdir(path.join(east.directory, 'vms')), []);
  process.kill(pid!, 'SIGKILL');
  // As after a restart of its host: it does not start the VM from its disk before it has been decided where that goes on.
  await south.start();
  const seen = await until(
    'south to tell',
    () => south.viper.getMigration({ params: { migration } }),
    ({ attention }) => attention !== undefined,
  );
  assert.match(seen.attention!, /The VM has ended before all of its memory was here/);
  await refused(south.viper.startVm(one), 'busy');
  await south.stop('SIGKILL');

  // The custodian's own daemon dies while it fetches the memory: it is as if nobody had claimed it, and is claimed again.
  await east.viper.claimEscrow(claim);
  await until(
    'the claim to be at work',
    () => east.viper.getVm(one),
    ({ state }) => state === 'arriving',
  );
  await east.stop('SIGKILL');
  await east.start();
  await refused(east.viper.getVm(one), 'not_found');
  assert.deepEqual(await readdir(path.join(east.directory, 'vms')), []);
  for (const { link } of relays) link!.limit({});
  await done(east.viper, east.viper.claimEscrow(claim));
  const { state, epoch } = await east.viper.getVm(one);
  assert.deepEqual([state, epoch], ['running', 5]);
  for await (const event of east.viper.events({ after: 0 })) {
    if (event.kind !== 'vm.claimed') continue;
    const { reason, from, epoch: by } = event.data;
    assert.deepEqual([reason, from, by], ['south burnt down', 'south', 5]);
    break;
  }
  // The checkers hold the disk against sums in memory: it is that of the same moment.
  await checked(guestAt(east), { memory: 26, disk: 13 });
  await sh(east.viper, 'one', 'md5sum -c /run/own; [ ! -e /data/late ]');
  await refused(east.viper.claimEscrow(claim), 'wrong_state');
  for (const { viper } of relays)
    await until(
      'the relays to forget',
      () => viper.getRelay(),
      ({ usedBytes }) => usedBytes === 0,
    );
  assert.doesNotMatch(await snapshotsOf(id), /viper-/);

  // The destination comes back, and so does the source: neither runs it, and nothing is left of it there.
  await south.start();
  await until('south to yield', () => refused(south.viper.getVm(one), 'not_found'));
  assert.deepEqual(await readdir(path.join(south.directory, 'vms')), []);
  await north.start();
  await refused(north.viper.getVm(one), 'not_found');
  await until('the migration to be over', () =>
    refused(south.viper.getMigration({ params: { migration } }), 'not_found'),
  );
  await assertWhole(east);
  await checked(guestAt(east), { memory: 4, disk: 1 });

  // One that becomes whole is released, and cannot be claimed any more.
  south.link!.limit({});
  const again = await east.viper.migrateVm({ ...one, body: { to: 'south', custodian: 'north' } });
  const { result: whole } = await east.viper.wait(again, { timeoutMs: patienceMs });
  const second = { params: { migration: whole!.migrationId! } };
  await until(
    'the end of it',
    () => south.viper.getMigration(second),
    ({ over }) => over,
  );
  assert.deepEqual((await north.viper.listEscrows()).items, []);
  await refused(north.viper.claimEscrow({ ...second, body: claim.body }), 'not_found');
  assert.doesNotMatch(await snapshotsOf(id), /viper-/);
  assert.deepEqual(await readdir(path.join(north.directory, 'escrows')), []);
  assert.deepEqual(await readdir(path.join(east.directory, 'escrows')), []);
  await checked(guestAt(south), { memory: 4, disk: 1 });
});
