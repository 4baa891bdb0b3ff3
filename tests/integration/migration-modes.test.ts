/** Every mode, and a control: the same guest moved by two QEMUs alone. */
import assert from 'node:assert/strict';
import { join } from 'node:path';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { migrationModes } from '../../src/model/migration.ts';
import { assertForward, assertNothingLeft, checked, Lab, startCheckers } from './migration-lab.ts';

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
