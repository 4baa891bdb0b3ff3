import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { migrationModes } from '../model/migration.ts';
import { GiB, MiB } from '../model/units.ts';
import { type EstimateInput, estimate } from './estimator.ts';

const input: EstimateInput = {
  mode: 'precopy',
  memoryBytes: GiB,
  zeroBytes: 0,
  diskBytes: 0,
  dirtyBps: 0,
  bandwidthBps: 8 * 100 * MiB,
  rttMs: 10,
  downtimeLimitMs: 300,
};

test('an idle guest costs its memory once', () => {
  const { bytes, rounds, converges, totalMs } = estimate(input);
  assert.equal(bytes, GiB);
  assert.equal(rounds, 2);
  assert.ok(converges && totalMs > 10_240 && totalMs < 10_500);
});

test('a guest that dirties half of what the link carries costs twice its memory, but for the last part', () => {
  const { bytes, converges } = estimate({ ...input, dirtyBps: input.bandwidthBps / 2 });
  assert.ok(converges);
  assert.ok(bytes > 1.9 * GiB && bytes < 2 * GiB);
});

test('a guest that dirties faster than the link never converges by pre-copy, and post-copy moves it at once', () => {
  const busy = { ...input, dirtyBps: 2 * input.bandwidthBps };
  const precopy = estimate(busy);
  assert.equal(precopy.converges, false);
  assert.ok(precopy.downtimeMs > 10_000);
  for (const mode of ['postcopy', 'hybrid', 'auto'] as const) {
    const other = estimate({ ...busy, mode });
    assert.equal(other.finishesAs, 'postcopy');
    assert.ok(other.downtimeMs < 200);
  }
});

test('a small working set converges whatever its rate', () => {
  const { converges } = estimate({ ...input, dirtyBps: 2 * input.bandwidthBps, workingSetBytes: 20 * MiB });
  assert.ok(converges);
});

test('more bandwidth never costs more time, and no figure is negative or endless', () => {
  const inputs = fc.record({
    mode: fc.constantFrom(...migrationModes),
    memoryBytes: fc.integer({ min: MiB, max: 64 * GiB }),
    zeroBytes: fc.integer({ min: 0, max: GiB }),
    diskBytes: fc.integer({ min: 0, max: 100 * GiB }),
    dirtyBps: fc.integer({ min: 0, max: 10 ** 10 }),
    bandwidthBps: fc.integer({ min: 10 ** 6, max: 10 ** 10 }),
    rttMs: fc.integer({ min: 0, max: 500 }),
    downtimeLimitMs: fc.integer({ min: 1, max: 5000 }),
  });
  fc.assert(
    fc.property(inputs, (one) => {
      const result = estimate(one);
      for (const value of [result.totalMs, result.downtimeMs, result.bytes, result.rounds])
        assert.ok(Number.isFinite(value) && value >= 0);
      assert.ok(result.bytes >= one.diskBytes);
      if (result.finishesAs === 'precopy' && result.converges)
        assert.ok(result.downtimeMs <= one.downtimeLimitMs + 61 + one.rttMs);
    }),
  );
});

test('an input that makes no sense is refused by its name', () => {
  assert.throws(() => estimate({ ...input, bandwidthBps: 0 }), /bandwidthBps is 0/);
  assert.throws(() => estimate({ ...input, dirtyBps: Number.NaN }), /dirtyBps is NaN/);
});
