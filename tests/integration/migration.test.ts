/** A running VM moves between two directories by real QEMUs, and verifies its own memory and disk all the while. */
import assert from 'node:assert/strict';
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'node:test';
import { MiB } from '../../src/model/units.ts';
import { diskUsage } from '../../src/vm/disks.ts';
import { checked, startCheckers } from './checking-guest.ts';
import { assertForward, assertNothingLeft, Lab, type Site } from './migration-lab.ts';

test('a VM moves from A to B and back without losing a byte', async (context) => {
  await using lab = await Lab.make();
  const first = await lab.boot(lab.a);
  await startCheckers(first);
  const allocated = async (site: Site) =>
    (await diskUsage(join(site.directory, 'disk.qcow2'))).allocatedBytes;
  const allocatedBefore = await allocated(lab.a);

  const there = await lab.migration(lab.a, lab.b, first);
  await there.source.start();
  assert.equal((await there.source.waitUntilOver()).name, 'moved');
  assert.equal((await there.destination.waitFor(({ name }) => name === 'settled')).name, 'settled');
  context.diagnostic(JSON.stringify(there.source.result));
  assert.ok(!existsSync(lab.a.directory));
  const second = there.destination.machine!;
  await checked(second);
  await assertNothingLeft(second, lab.b);
  // A thin disk stays thin, but for what the guest has written meanwhile.
  assert.ok((await allocated(lab.b)) < allocatedBefore + 8 * MiB);
  assertForward(there.progress);
  assert.deepEqual(there.failures, []);

  const back = await lab.migration(lab.b, lab.a, second, { epoch: 2 });
  await back.source.start();
  assert.equal((await back.source.waitUntilOver()).name, 'moved');
  await back.destination.waitFor(({ name }) => name === 'settled');
  context.diagnostic(JSON.stringify(back.source.result));
  assert.equal(back.destination.state.name === 'settled' && back.destination.state.epoch, 3);
  await checked(back.destination.machine!);
});
