import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { place, type RelayView, windowOf } from './placement.ts';

const relay = (more: Partial<RelayView> = {}): RelayView => ({
  canBeAsked: true,
  freeBytes: 1e9,
  inFlightBytes: 0,
  expectedBytes: 0,
  bytesPerSecond: 1e7,
  ...more,
});

test('a slab goes to the relays that hold it soonest', () => {
  const views = [
    relay({ bytesPerSecond: 1e6 }),
    relay(),
    relay({ inFlightBytes: 200_000 }),
    relay({ bytesPerSecond: 2e7 }),
  ];
  assert.deepEqual(place(views, 100_000, 2), { relays: [3, 1] });
});

test('of equal relays those with the most room are taken', () => {
  const views = [relay({ freeBytes: 1e8 }), relay({ freeBytes: 3e8 }), relay({ freeBytes: 2e8 })];
  assert.deepEqual(place(views, 100_000, 2), { relays: [1, 2] });
});

test('one that nobody has measured is tried', () => {
  assert.deepEqual(place([relay(), relay({ bytesPerSecond: undefined, freeBytes: 2e9 })], 100_000, 1), {
    relays: [1],
  });
});

test('relays that are busy are waited for; when too few are left nobody waits', () => {
  const busy = relay({ inFlightBytes: 6e6 });
  assert.equal(place([relay(), busy], 100_000, 2), 'wait');
  assert.equal(place([relay(), relay({ canBeAsked: false })], 100_000, 2), 'none');
  assert.equal(place([relay(), relay({ freeBytes: 50_000 })], 100_000, 2), 'none');
  assert.equal(place([], 100_000, 1), 'none');
});

test('what is on its way to a relay counts as taken there', () => {
  assert.equal(place([relay({ freeBytes: 250_000, inFlightBytes: 200_000 })], 100_000, 1), 'none');
  assert.equal(place([relay({ freeBytes: 250_000, expectedBytes: 200_000 })], 100_000, 1), 'none');
});

test('whatever the relays are: each place is another one, that may be asked, and has room', () => {
  const views = fc.array(
    fc.record({
      canBeAsked: fc.boolean(),
      freeBytes: fc.integer({ min: 0, max: 1e7 }),
      inFlightBytes: fc.integer({ min: 0, max: 3e7 }),
      expectedBytes: fc.integer({ min: 0, max: 3e6 }),
      bytesPerSecond: fc.option(fc.integer({ min: 1, max: 1e9 }), { nil: undefined }),
    }),
    { maxLength: 8 },
  );
  fc.assert(
    fc.property(
      views,
      fc.integer({ min: 1, max: 1e6 }),
      fc.integer({ min: 1, max: 3 }),
      (given, slabBytes, count) => {
        const placement = place(given, slabBytes, count);
        if (typeof placement === 'string') return;
        assert.equal(new Set(placement.relays).size, count);
        for (const number of placement.relays) {
          const view = given[number]!;
          assert.ok(view.canBeAsked && view.freeBytes - view.inFlightBytes - view.expectedBytes >= slabBytes);
          assert.ok(view.inFlightBytes < windowOf(view));
        }
      },
    ),
  );
});
