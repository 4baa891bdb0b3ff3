import assert from 'node:assert/strict';
import { test } from 'node:test';
import { GiB, MiB } from '../model/units.ts';
import { type DrainFacts, planDrain } from './drain-plan.ts';

const vm = (name: string, more: object = {}) => ({
  name,
  memoryBytes: 500 * MiB,
  diskBytes: 0,
  toBps: 100e6,
  ...more,
});
const facts = (more: Partial<DrainFacts> = {}): DrainFacts => ({
  deadlineMs: 60_000,
  vms: [vm('web')],
  uplinkBps: 1e9,
  relays: { count: 3, freeBytes: 8 * GiB },
  replicas: 2,
  ...more,
});
const engines = (wanted: DrainFacts) =>
  planDrain(wanted).moves.map(({ name, engine }) => `${name} ${engine}`);

test('a VM whose destination is slow leaves by way of relays, and one whose destination is not does not', () => {
  assert.deepEqual(engines(facts()), ['web relayed']);
  assert.deepEqual(engines(facts({ vms: [vm('web', { toBps: 1e9 })] })), ['web condensed']);
});

test('without enough relays, or memory of theirs, it does without', () => {
  assert.deepEqual(engines(facts({ relays: { count: 1, freeBytes: 8 * GiB } })), ['web condensed']);
  assert.deepEqual(engines(facts({ relays: { count: 3, freeBytes: 900 * MiB } })), ['web condensed']);
  const two = [vm('small', { memoryBytes: 300 * MiB }), vm('large', { memoryBytes: 600 * MiB })];
  const scarce = { count: 3, freeBytes: 1300 * MiB };
  assert.deepEqual(engines(facts({ vms: two, relays: scarce })), ['large relayed', 'small condensed']);
});

test('a disk that must be copied goes at the rate of the destination, whatever relays there are', () => {
  const plain = planDrain(facts()).totalMs;
  const withDisk = planDrain(facts({ vms: [vm('web', { diskBytes: 100e6 })] })).totalMs;
  assert.equal(withDisk - plain, 8000);
});

test('it says beforehand whether the deadline can be met, and empties most of the host first', () => {
  const vms = [vm('a'), vm('b', { memoryBytes: 100 * MiB }), vm('c', { memoryBytes: 900 * MiB })];
  const plan = planDrain(facts({ vms }));
  assert.deepEqual(
    plan.moves.map(({ name }) => name),
    ['b', 'a', 'c'],
  );
  assert.equal(plan.fits, true);
  assert.equal(planDrain(facts({ vms, deadlineMs: plan.totalMs })).fits, true);
  assert.equal(planDrain(facts({ vms, deadlineMs: plan.totalMs - 1 })).fits, false);
  assert.equal(planDrain(facts({ vms, relays: { count: 0, freeBytes: 0 } })).fits, false);
  assert.deepEqual(planDrain(facts({ vms: [] })), { moves: [], totalMs: 0, fits: true });
});
