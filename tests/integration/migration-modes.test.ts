/** Every mode, and a control: the same guest moved by two QEMUs alone. */
import assert from 'node:assert/strict';
import { join } from 'node:path';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { migrationModes } from '../../src/model/migration.ts';
import { checked, startCheckers, startWriting } from './checking-guest.ts';
import { assertForward, assertNothingLeft, Lab } from './migration-lab.ts';

test('a VM that writes goes from site to site in every mode', async (context) => {
  await using lab = await Lab.make();
  let machine = await lab.boot(lab.a);
  await startCheckers(machine);
  let [from, to] = [lab.a, lab.b];
  for (const [index, mode] of migrationModes.entries()) {
    const pair = await lab.migration(from, to, machine, { mode, epoch: index + 1 });
    await pair.source.start();
    assert.equal((await pair.source.waitUntilOver()).name, 'moved');
    await pair.destination.waitFor(({ name }) => name === 'settled');
    context.diagnostic(`${mode}: ${JSON.stringify(pair.source.result)}`);
    machine = pair.destination.machine!;
    await checked(machine);
    await assertNothingLeft(machine, to);
    assertForward(pair.progress);
    assert.deepEqual([pair.failures, pair.told], [[], []]);
    [from, to] = [to, from];
  }
});

test('a guest that writes all the time moves by hybrid and auto over a slow link, and by several streams', async (context) => {
  await using lab = await Lab.make();
  let machine = await lab.boot(lab.a);
  await startCheckers(machine);
  await startWriting(machine);
  let [from, to] = [lab.a, lab.b];
  const busy = { downtimeMs: 30, autoConverge: false, bandwidthBps: 200_000_000 };
  const cases = [
    { mode: 'hybrid', limits: busy },
    { mode: 'auto', limits: busy },
    { mode: 'precopy', channels: 2, limits: { downtimeMs: 1000, autoConverge: true } },
  ] as const;
  for (const [index, wanted] of cases.entries()) {
    const pair = await lab.migration(from, to, machine, { ...wanted, epoch: index + 1 });
    await pair.source.start();
    assert.equal((await pair.source.waitUntilOver()).name, 'moved');
    await pair.untilDestination('settled');
    context.diagnostic(`${wanted.mode}: ${JSON.stringify(pair.source.result)}`);
    machine = pair.destination.machine!;
    await checked(machine, { memory: 26, disk: 13 });
    await assertNothingLeft(machine, to);
    assertForward(pair.progress);
    [from, to] = [to, from];
  }
});

test('a VM on a shared disk moves without its disk, and its limits can be changed on the way', async (context) => {
  await using lab = await Lab.make();
  const shared = join(lab.shared, 'disk.qcow2');
  const machine = await lab.boot(lab.a, shared);
  await startCheckers(machine);
  const slow = { downtimeMs: 300, autoConverge: false, bandwidthBps: 10_000_000 };
  const pair = await lab.migration(lab.a, lab.b, machine, {
    storage: 'shared',
    diskFile: shared,
    limits: slow,
  });
  await pair.source.start();
  await pair.untilPhase('memory');
  await pair.source.setLimits({ downtimeMs: 300, autoConverge: false });
  assert.equal((await pair.source.waitUntilOver()).name, 'moved');
  await pair.untilDestination('settled');
  context.diagnostic(JSON.stringify(pair.source.result));
  assert.equal(pair.source.result.diskBytes, 0);
  await checked(pair.destination.machine!);
  // And back after a rejection: the disk has had two owners in between.
  const back = await lab.migration(lab.b, lab.a, pair.destination.machine!, {
    storage: 'shared',
    diskFile: shared,
    epoch: 2,
  });
  back.beforeDelivery = async (message) => {
    if (message.name === 'commit') await back.destination.machine?.kill();
  };
  await back.source.start();
  const state = await back.source.waitUntilOver();
  assert.equal(state.name === 'ended' && state.ending.code, 'rejected');
  await checked(pair.destination.machine!);
});

test('control: the same guest, moved by QEMU alone with a shared disk, verifies too', async () => {
  await using lab = await Lab.make();
  const disk = join(lab.a.directory, 'disk.qcow2');
  const source = await lab.boot(lab.a);
  await startCheckers(source);
  const destination = await lab.launch(lab.b, true, disk);
  const uri = `unix:${destination.paths.incoming}`;
  await destination.qmp.execute('migrate-incoming', { uri });
  await source.qmp.execute('migrate', { uri });
  while ((await destination.qmp.execute('query-migrate')).status !== 'completed') await sleep(20);
  await source.kill();
  await destination.resume();
  await checked(destination);
});
