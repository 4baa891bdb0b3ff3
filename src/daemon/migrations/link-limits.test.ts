import assert from 'node:assert/strict';
import { test } from 'node:test';
import { testStore } from '../store/fixtures.ts';
import { LinkLimits } from './link-limits.ts';

test('the limit of the config holds until another is set, which outlives the daemon', () => {
  using fixture = testStore();
  const limits = new LinkLimits(fixture.store, 10_000_000);
  assert.equal(limits.cloudletBps, 10_000_000);
  limits.setCloudlet(5_000_000);
  assert.equal(new LinkLimits(fixture.store, 10_000_000).cloudletBps, 5_000_000);
  limits.setCloudlet(null);
  assert.equal(new LinkLimits(fixture.store, 10_000_000).cloudletBps, null);
});

test('the sessions of one migration are one party with one limit, those of another are another', () => {
  using fixture = testStore();
  const limits = new LinkLimits(fixture.store, undefined);
  limits.setMigration('one', { bandwidthBps: 8_000_000 });
  const [disk, memory, other] = [limits.of('one'), limits.of('one'), limits.of('two')];
  assert.equal(disk.party, memory.party);
  assert.notEqual(disk.party, other.party);
  assert.deepEqual(
    disk.limiters.map(({ rateBps }) => rateBps),
    [8_000_000, null],
  );
  limits.setMigration('one', { bandwidthBps: undefined });
  assert.equal(memory.limiters[0]!.rateBps, null);
  assert.equal(disk.limiters[1], other.limiters[1]);
});
