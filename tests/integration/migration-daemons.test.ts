/** A VM moves between real daemons while its guest checks its own memory and disk; refusals; drain; a sample of faults. */
import assert from 'node:assert/strict';
import { existsSync } from 'node:fs';
import { stat } from 'node:fs/promises';
import path from 'node:path';
import { DatabaseSync } from 'node:sqlite';
import { after, before, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import type { SourceRecord } from '../../src/daemon/migrations/record.ts';
import { stateFileName } from '../../src/daemon/store/database.ts';
import { loadCloudlet, PeerClient } from '../../src/fleet/index.ts';
import type { LabCloudlet, LabFleet } from '../../src/lab/fleet.ts';
import { openSession, type Session } from '../../src/link/index.ts';
import { newId } from '../../src/model/ids.ts';
import { MiB } from '../../src/model/units.ts';
import type { Image, Migration } from '../../src/sdk/node.ts';
import { quickCases } from '../faults/cases.ts';
import { qemusOf, vcpuTicks } from '../faults/outside.ts';
import { Stage } from '../faults/stage.ts';
import { checked, startCheckers } from './checking-guest.ts';
import { assertGone, booted, done, importTiny, openFleet, patienceMs, refused, until } from './lab-vm.ts';

const options = { timeout: 900_000 };
const hardware = { memoryBytes: 128 * MiB, diskBytes: 64 * MiB };
/** Slow enough to do something meanwhile. */
const slow = { bandwidthBps: 20_000_000 };

let fleet: LabFleet;
let north: LabCloudlet;
let south: LabCloudlet;
let image: Image;
let vmId: string;

before(async () => {
  fleet = await openFleet();
  north = await fleet.add('north');
  south = await fleet.add('south');
  image = await importTiny(north.viper);
  vmId = await make('one');
  await startCheckers(guestAt(north, 'one'));
}, options);
after(async () => {
  await fleet?.[Symbol.asyncDispose]();
});

async function make(name: string): Promise<string> {
  const body = { name, image: 'tiny', instanceType: 'tiny', hardware };
  const id = await done(north.viper, north.viper.createVm({ body }));
  await booted(north.viper, name);
  return id;
}

/** The guest as the checkers of a guest want it. */
function guestAt({ viper }: LabCloudlet, vm: string): Parameters<typeof checked>[0] {
  const exec = (body: { argv: string[] }) => viper.execInGuest({ params: { vm }, body });
  return { agent: { exec } } as unknown as Parameters<typeof checked>[0];
}

const verified = (at: LabCloudlet, vm = 'one') => checked(guestAt(at, vm), { memory: 24, disk: 12 });

async function move(from: LabCloudlet, to: LabCloudlet, mode: 'precopy' | 'hybrid'): Promise<Migration> {
  const operation = await from.viper.migrateVm({ params: { vm: 'one' }, body: { to: to.name, mode } });
  const ended = await from.viper.wait(operation, { timeoutMs: patienceMs });
  return from.viper.getMigration({ params: { migration: ended.result!.migrationId! } });
}

/** A migration of `one` that is at work on its memory. */
async function whileMemoryIsCopied() {
  const operation = await north.viper.migrateVm({
    params: { vm: 'one' },
    body: { to: 'south', mode: 'precopy', limits: slow },
  });
  const migrationId = operation.subject.migrationId!;
  await until(
    'the memory phase',
    () => north.viper.getMigration({ params: { migration: migrationId } }),
    ({ progress }) => progress?.phase === 'memory' && progress.doneBytes > 0,
  );
  return { operation, migrationId };
}

test(
  'a base image goes on where it was after its destination died, and one that is cancelled leaves nothing',
  options,
  async () => {
    await north.viper.limitCloudlet({ body: { bandwidthBps: 8_000_000 } });
    const operation = await north.viper.migrateVm({ params: { vm: 'one' }, body: { to: 'south' } });
    const partial = path.join(south.directory, 'images', 'partial', image.digest.replace(':', '-'), 'disk');
    await until('the first bytes', async () => (await stat(partial)).size > MiB);
    await south.stop('SIGKILL');
    const { size, ino } = await stat(partial);
    await south.start();
    await until('more of them', async () => (await stat(partial)).size > size);
    assert.equal((await stat(partial)).ino, ino);
    await north.viper.cancelOperation({ params: { operation: operation.id } });
    await refused(north.viper.wait(operation, { timeoutMs: patienceMs }), 'cancelled');
    await until('its end there', () => !existsSync(partial));
    await north.viper.limitCloudlet({ body: { bandwidthBps: null } });
  },
);

test(
  'a VM moves there with its base image, and back, and finds its memory and disk as they were',
  options,
  async () => {
    assert.deepEqual((await south.viper.listImages()).items, []);
    const plan = await north.viper.planMigration({ params: { vm: 'one' }, body: { to: 'south' } });
    assert.deepEqual(plan.problems, []);
    assert.ok(plan.forecast!.totalMs > 0 && plan.forecast!.inputs.dirtyBps! > 0);
    const there = await move(north, south, 'precopy');
    assert.deepEqual([there.state, there.over, there.result?.finishedAs], ['moved', true, 'precopy']);
    assert.ok(there.result!.downtimeMs! > 0 && there.result!.memoryBytes > 0 && there.result!.diskBytes > 0);
    assert.equal((await south.viper.listImages()).items[0]?.digest, image.digest);
    assert.deepEqual((await north.viper.listVms()).items, []);
    await verified(south);
    const back = await move(south, north, 'hybrid');
    assert.equal(back.state, 'moved');
    await verified(north);
    assert.equal((await north.viper.getVm({ params: { vm: vmId } })).epoch, 3);
    // The history of both stays, each with its own figures.
    const history = (await north.viper.listMigrations()).items.filter(({ role }) => role === 'source');
    assert.deepEqual(
      history.map(({ result }) => result?.memoryBytes),
      [there.result!.memoryBytes],
    );
  },
);

test(
  'one that is cancelled while its memory is copied runs on here, and nothing is left there',
  options,
  async () => {
    const { operation, migrationId } = await whileMemoryIsCopied();
    const [pid] = await qemusOf(vmId, north.directory);
    const params = { migration: migrationId };
    const bytes = async () => (await north.viper.getMigration({ params })).progress!.doneBytes;
    const limits = { downtimeMs: 300, autoConverge: true, ...slow };
    const paused = await north.viper.limitMigration({ params, body: { ...limits, paused: true } });
    assert.ok(paused.options.limits.paused && paused.options.limits.autoConverge);
    let before = await bytes();
    await until('its pause', async () => {
      await sleep(1000);
      const now = await bytes();
      const isStill = now === before;
      before = now;
      return isStill;
    });
    await north.viper.limitMigration({ params, body: limits });
    await until('more bytes', async () => (await bytes()) > before);
    await north.viper.cancelOperation({ params: { operation: operation.id } });
    // Within a second, says the issue: so no second without work of its vCPUs, which the checkers keep busy.
    for (let second = 0; second < 3; second += 1) {
      const before = await vcpuTicks(pid!);
      await sleep(1000);
      assert.ok((await vcpuTicks(pid!)) > before);
    }
    await refused(north.viper.wait(operation, { timeoutMs: patienceMs }), 'cancelled');
    assert.equal((await north.viper.getVm({ params: { vm: 'one' } })).state, 'running');
    await until(
      'the end there',
      () => south.viper.listVms(),
      ({ items }) => items.length === 0,
    );
    assert.deepEqual(await qemusOf(vmId, south.directory), []);
    const { state, failure } = await north.viper.getMigration({ params: { migration: migrationId } });
    assert.deepEqual([state, failure?.code], ['ended', 'cancelled']);
    await verified(north);
  },
);

test('a refusal lists all that does not fit, at once', options, async () => {
  await done(
    south.viper,
    south.viper.createVm({ body: { name: 'one', image: image.digest, instanceType: 'tiny', start: false } }),
  );
  const error = await refused(
    north.viper.migrateVm({ params: { vm: 'one' }, body: { to: 'south' } }),
    'migration_refused',
  );
  assert.match(error.message, /Another VM there is called 'one'/);
  // The rest as a source could ask it, which is a cloudlet with more room and more networks than this one.
  const { spec } = await north.viper.getVm({ params: { vm: 'one' } });
  const vm = {
    id: newId(),
    name: 'one',
    spec: { ...spec, memoryBytes: 2 ** 40, nets: [{ ...spec.nets[0]!, network: 'nowhere' }] },
    running: true,
    epoch: 1,
    runningWith: 'tcg',
    image: { digest: image.digest, format: image.format, fileBytes: image.fileBytes, virtualBytes: 0 },
    diskBytes: 2 ** 50,
  };
  const limits = { downtimeMs: 300, autoConverge: false };
  const json = {
    vm,
    options: { mode: 'auto', storage: 'copied', limits, channels: 0 },
    qemuVersion: '10.0.0',
    sentAt: new Date(Date.now() - 3_600_000).toISOString(),
  };
  using client = new PeerClient(await loadCloudlet(north.directory));
  const [peer] = (await north.viper.listPeers()).items;
  const answer = await client.fetch(peer!, `/v1/migrations/${newId()}/check`, { method: 'POST', json });
  const { problems } = answer as { problems: { field: string }[] };
  assert.deepEqual(
    problems.map(({ field }) => field),
    ['memory', 'disk', 'nets.0.network', 'name', 'clock'],
  );
  await done(south.viper, south.viper.deleteVm({ params: { vm: 'one' } }));
});

test(
  'a wrong ticket and one used before are refused; a daemon that was stopped undoes what it had begun',
  options,
  async () => {
    const { migrationId } = await whileMemoryIsCopied();
    const identity = await loadCloudlet(north.directory);
    const session = (secret: string): Promise<Session> =>
      openSession({
        url: south.url,
        tls: () => identity.tls,
        expectCloudletId: south.id,
        identify: () => ({ cloudletId: south.id }),
        purpose: 'viper-memory/1',
        hello: { migrationId, secret },
        signal: AbortSignal.timeout(20_000),
      });
    const isEnded = async (secret: string): Promise<boolean> => {
      const opened = await session(secret).catch(() => undefined);
      if (!opened) return true;
      opened.on('error', () => {}).resume();
      await until('its end', () => opened.destroyed);
      return true;
    };
    assert.ok(await isEnded('00'.repeat(32)));
    // Only a daemon that has stopped lets others read its journal; its migration waits meanwhile.
    await north.stop();
    assert.ok(await isEnded(secretOf(migrationId)));
    await north.start();
    const ended = await until(
      'the end',
      () => north.viper.getMigration({ params: { migration: migrationId } }),
      ({ over }) => over,
    );
    assert.deepEqual([ended.state, ended.failure?.code], ['ended', 'interrupted']);
    await until(
      'the VM',
      () => north.viper.getVm({ params: { vm: 'one' } }),
      ({ state, operationId }) => state === 'running' && !operationId,
    );
    await verified(north);
  },
);

test(
  'a daemon starts although the QEMU of a VM in migration hangs, and goes on with it when that answers',
  options,
  async () => {
    const { migrationId } = await whileMemoryIsCopied();
    const migration = () => north.viper.getMigration({ params: { migration: migrationId } });
    const [pid] = await qemusOf(vmId, north.directory);
    await north.stop('SIGKILL');
    process.kill(pid!, 'SIGSTOP');
    try {
      await north.start();
      const { state, over } = await migration();
      assert.deepEqual([state, over], ['copying', false]);
      for await (const { kind, data } of north.viper.events({
        after: 0,
        signal: AbortSignal.timeout(20_000),
      }))
        if (kind === 'migration.attention' && data.migrationId === migrationId) break;
    } finally {
      process.kill(pid!, 'SIGCONT');
    }
    const ended = await until('the end', migration, ({ over }) => over);
    assert.deepEqual([ended.state, ended.failure?.code], ['ended', 'interrupted']);
    await until(
      'the VM',
      () => north.viper.getVm({ params: { vm: 'one' } }),
      ({ state, operationId }) => state === 'running' && !operationId,
    );
    await verified(north);
  },
);

/** From the journal of the source, which nobody else can read. */
function secretOf(migrationId: string): string {
  const database = new DatabaseSync(path.join(north.directory, stateFileName), { readOnly: true });
  try {
    const row = database.prepare('SELECT record FROM migrations WHERE id = ?').get(migrationId);
    const { state } = JSON.parse(String(row!.record)) as SourceRecord;
    return state.name === 'copying' ? state.ticket.secret : assert.fail(`the migration is ${state.name}`);
  } finally {
    database.close();
  }
}

test(
  'a cloudlet is drained to its peer, takes nothing, and takes VMs again when undrained',
  options,
  async () => {
    const clone = { params: { vm: 'one' }, body: { name: 'two' } };
    const second = await done(north.viper, north.viper.cloneVm(clone));
    // One that is called off leaves both where they are; the cloudlet takes none until it is undrained.
    // South has kept memory of the first, so that only a slow link holds it here, and not for long.
    await north.viper.limitCloudlet({ body: { bandwidthBps: 1_000_000 } });
    const off = await north.viper.drainCloudlet({ body: {} });
    await until(
      'a migration',
      () => north.viper.getVm({ params: { vm: 'one' } }),
      ({ state }) => state === 'migrating',
    );
    await north.viper.cancelOperation({ params: { operation: off.id } });
    await refused(north.viper.wait(off, { timeoutMs: patienceMs }), 'cancelled');
    await north.viper.limitCloudlet({ body: { bandwidthBps: null } });
    for (const vm of ['one', 'two'])
      await until(
        vm,
        () => north.viper.getVm({ params: { vm } }),
        ({ state }) => state === 'running',
      );
    assert.deepEqual((await south.viper.listVms()).items, []);
    assert.ok((await north.viper.getCloudlet()).draining);
    await north.viper.undrainCloudlet();
    assert.ok(!(await north.viper.getCloudlet()).draining);
    const drained = await north.viper.wait(await north.viper.drainCloudlet({ body: {} }), {
      timeoutMs: 2 * patienceMs,
    });
    assert.deepEqual(drained.result?.moved?.split(' ').sort(), ['one', 'two']);
    assert.deepEqual((await north.viper.listVms()).items, []);
    for (const vm of ['one', 'two']) await verified(south, vm);
    const body = { name: 'three', image: 'tiny', instanceType: 'tiny' };
    await refused(north.viper.createVm({ body }), 'wrong_state');
    await refused(
      south.viper.migrateVm({ params: { vm: 'one' }, body: { to: 'north' } }),
      'migration_refused',
    );
    await north.viper.undrainCloudlet();
    await move(south, north, 'precopy');
    await done(south.viper, south.viper.deleteVm({ params: { vm: 'two' }, query: { force: true } }));
    await assertGone(south, second);
  },
);

test('a VM that is in no migration is not claimed', options, async () => {
  const claim = { params: { vm: 'one' }, body: { reason: 'to see what happens' } };
  await refused(north.viper.claimVm(claim), 'wrong_state');
});

test('a cloudlet that was put out of the fleet can neither give nor take', options, async () => {
  await north.viper.removePeer({ params: { peer: south.id } });
  await refused(north.viper.migrateVm({ params: { vm: 'one' }, body: { to: 'south' } }), 'not_found');
  const json = { name: 'ask' };
  using client = new PeerClient(await loadCloudlet(south.directory));
  const peer = (await south.viper.listPeers()).items.find(({ id }) => id === north.id);
  await assert.rejects(client.fetch(peer!, `/v1/migrations/${newId()}/messages`, { method: 'POST', json }));
  assert.equal((await north.viper.getVm({ params: { vm: 'one' } })).state, 'running');
});

test('a sample of the fault table: nothing lost, nothing doubled, nothing left', {
  timeout: 1_800_000,
}, async () => {
  await using stage = await Stage.set({ cutMs: 3000 });
  for (const one of quickCases) {
    const { name, lost, doubled, leftovers, problem } = await stage.run(one);
    assert.deepEqual(
      { name, lost, doubled, leftovers, problem },
      { name, lost: false, doubled: false, leftovers: [], problem: undefined },
    );
  }
});
