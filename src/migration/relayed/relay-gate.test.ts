import assert from 'node:assert/strict';
import { test } from 'node:test';
import { RelayGate } from './relay-gate.ts';

/**
 * An uplink that direct and relays share; relays take half of it where they can. Gives the share of the time in which the
 * gate was open, when it was first, and what was placed in the end.
 */
function run(
  rates: { uplink: number; destination: (ms: number) => number; replicas?: number; relaysPerMs?: number },
  ms = 20_000,
) {
  const { uplink, destination, replicas = 2, relaysPerMs = 0 } = rates;
  const gate = new RelayGate();
  const placed = { now: 0, directBytes: 0, relayedBytes: 0, relaysPerMs };
  let openMs = 0;
  /** Until it was open first. */
  let closedMs: number | undefined;
  for (; placed.now < ms; placed.now += 5) {
    const isOpen = gate.isOpen({ ...placed });
    const toRelays = isOpen ? Math.max(uplink / 2, uplink - destination(placed.now)) : 0;
    placed.directBytes += 5 * Math.min(destination(placed.now), uplink - toRelays);
    placed.relayedBytes += (5 * toRelays) / replicas;
    if (isOpen) openMs += 5;
    if (isOpen) closedMs ??= placed.now;
  }
  return {
    closedMs: closedMs ?? ms,
    openShare: openMs / ms,
    placedBytes: placed.directBytes + placed.relayedBytes,
  };
}

test('with a slow destination relays are used nearly all the time', () => {
  const { openShare } = run({ uplink: 1000, destination: () => 100 });
  assert.ok(openShare > 0.95, String(openShare));
});

test('with a destination that takes all that can leave, next to nothing is lost to relays', () => {
  const { openShare, placedBytes } = run({ uplink: 1000, destination: () => 1000 });
  assert.ok(openShare < 0.2, String(openShare));
  assert.ok(placedBytes > 0.94 * 1000 * 20_000, String(placedBytes));
});

test('where relays have shown what they take, one that takes much less is not looked at for long', () => {
  const first = (destination: number, relaysPerMs: number) => {
    const { closedMs } = run({ uplink: 1000, destination: () => destination, relaysPerMs }, 1000);
    return closedMs;
  };
  assert.ok(first(100, 1000) < 150);
  assert.ok(first(100, 0) > 250 && first(900, 1000) > 250);
});

test('a destination that becomes slow, or quick, is noticed', () => {
  const slower = run({ uplink: 1000, destination: (ms) => (ms < 5000 ? 1000 : 50) });
  assert.ok(slower.openShare > 0.5, String(slower.openShare));
  const dead = run({ uplink: 1000, destination: () => 0 });
  assert.ok(dead.openShare > 0.95, String(dead.openShare));
});
