/**
 * The relayed engine with real QEMUs: the source is gone while most of the memory is with relays, and the guest, which
 * verifies what it writes, runs at the destination all the while. One VM goes through all of it.
 */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { MiB } from '../../src/model/units.ts';
import { checked, startCheckers } from './checking-guest.ts';
import { LabRelay } from './lab-relay.ts';
import { assertNothingLeft, Lab } from './migration-lab.ts';

/** To the destination it goes slowly, so that most is given to relays. */
const relayed = {
  engine: 'relayed',
  limits: { downtimeMs: 300, autoConverge: false, bandwidthBps: 20_000_000 },
} as const;
const giveBytesPerSecond = 8_000_000;

test('the source is gone before the VM is whole; whatever is lost then, the guest verifies', async (context) => {
  await using lab = await Lab.make();
  let machine = await lab.boot(lab.a);
  await startCheckers(machine);
  let [from, to] = [lab.a, lab.b];
  let epoch = 1;
  for (const [lost, mode] of [
    ['nothing', 'hybrid'],
    ['a relay', 'postcopy'],
    ['the destination', 'postcopy'],
  ] as const) {
    const lenders = ['r1', 'r2', 'r3'].map((name) => new LabRelay(name, giveBytesPerSecond));
    for (const lender of lenders) lender.others = lenders;
    const pair = await lab.migration(from, to, machine, { ...relayed, mode, lenders, epoch });
    await pair.source.start();
    await pair.source.waitFor(({ name }) => name === 'switching');
    const heldBytes = lenders.reduce((sum, { store }) => sum + store.usedBytes, 0);
    if (mode === 'hybrid')
      assert.ok(heldBytes > 32 * MiB, `relays hold ${heldBytes} bytes when the VM leaves`);
    assert.equal((await pair.source.waitUntilOver()).name, 'moved');
    const { result } = pair.source;
    await pair.untilDestination('merging');
    assert.ok(pair.manifest, 'where the memory is, is written down');
    assert.ok(result.relayed!.slabs > 20, `${result.relayed!.slabs} slabs`);
    assert.equal(machine.qmp.state, 'closed');
    if (lost === 'a relay') lenders[1]!.die();
    if (lost === 'the destination') await pair.restart('destination');
    // While QEMU waits for its stream to come back, so may the guest.
    else await checked(pair.destination.machine!, { memory: 4, disk: 1 });
    await pair.untilDestination('settled');
    machine = pair.destination.machine!;
    const merged = pair.destination.mergeStatistics;
    context.diagnostic(`${mode}, ${lost} lost: ${JSON.stringify({ ...result, merged })}`);
    assert.ok(merged!.slabs > 0);
    await checked(machine, { memory: 26, disk: 4 });
    await assertNothingLeft(machine, to);
    assert.equal(pair.manifest, undefined);
    assert.deepEqual([pair.failures, pair.told], [[], []]);
    for (const { name, store } of lenders)
      if (lost !== 'a relay' || name !== 'r2') assert.equal(store.usedBytes, 0, `${name} has forgotten it`);
    [from, to] = [to, from];
    epoch += 1;
  }
});
