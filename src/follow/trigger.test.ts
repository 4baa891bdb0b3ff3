import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import {
  newTriggerState,
  type Observation,
  observe,
  defaultTriggerPolicy as policy,
  type TriggerState,
} from './trigger.ts';

const own = 'c1';

/** Feeds observations; what fires is answered as `answer` says. Gives the times at which something fired. */
function feed(
  observations: readonly Observation[],
  answer: 'moved' | 'stayed',
  start: TriggerState = newTriggerState(0),
): { atMs: number; kind: string }[] {
  let state = start;
  const fired: { atMs: number; kind: string }[] = [];
  for (const observation of observations) {
    const step = observe(state, observation, policy, own);
    state = step.state;
    if (!step.fired) continue;
    const { atMs } = observation;
    fired.push({ atMs, kind: step.fired.kind });
    const reply: Observation =
      answer === 'moved' ? { kind: 'moved', atMs } : { kind: 'stayed', key: step.fired.key, atMs };
    state = observe(state, reply, policy, own).state;
  }
  return fired;
}

const rtt = (atMs: number, smoothedMs: number): Observation => ({ kind: 'rtt', smoothedMs, atMs });
const lan = (atMs: number, cloudletId: string | undefined): Observation => ({
  kind: 'lan',
  cloudletId,
  atMs,
});

test('a device that comes to another LAN fires at once', () => {
  assert.deepEqual(feed([lan(0, own), rtt(100, 5), lan(5000, 'c2')], 'moved'), [{ atMs: 5000, kind: 'lan' }]);
});

test('an RTT over the threshold fires once it has lasted, a peak does not', () => {
  assert.deepEqual(feed([rtt(0, 5), rtt(100, 80), rtt(500, 5), rtt(1200, 80)], 'moved'), []);
  assert.deepEqual(feed([rtt(0, 5), rtt(100, 80), rtt(700, 80), rtt(1100, 80)], 'moved'), [
    { atMs: 1100, kind: 'rtt' },
  ]);
});

test('an RTT that wanders between the two marks is asked about once, and again after a while', () => {
  const wander = Array.from({ length: 29 }, (_, i) => rtt(i * 1000, i % 3 === 2 ? 35 : 60));
  const lasting = [rtt(0, 60), ...Array.from({ length: 100 }, (_, i) => rtt(500 + i * 500, 60))];
  assert.deepEqual(feed(wander, 'stayed').length, 1);
  assert.deepEqual(
    feed(lasting, 'stayed').map(({ atMs }) => atMs),
    [1000, 31_000],
  );
});

test('below the lower mark the RTT trigger is armed again', () => {
  const twice = [rtt(0, 60), rtt(1000, 60), rtt(2000, 10), rtt(3000, 60), rtt(4000, 60)];
  const once = [rtt(0, 60), rtt(1000, 60), rtt(2000, 35), rtt(3000, 60), rtt(4000, 60)];
  assert.deepEqual([feed(twice, 'stayed').length, feed(once, 'stayed').length], [2, 1]);
});

test('a device of which nothing is heard is looked for at longer and longer intervals', () => {
  const ticks = Array.from({ length: 600 }, (_, i): Observation => ({ kind: 'tick', atMs: i * 100 }));
  const fired = feed(ticks, 'stayed').map(({ atMs }) => atMs);
  const gaps = fired.slice(1).map((atMs, i) => atMs - fired[i]!);
  assert.equal(fired[0], policy.lostAfterMs);
  assert.deepEqual(
    gaps,
    gaps.toSorted((a, b) => a - b),
  );
  assert.ok(gaps.every((gap) => gap <= policy.reconsiderMs) && gaps.length >= 4, gaps.join(' '));
});

test('a trigger that comes during the cool-down fires at its end, if it still holds', () => {
  const state = newTriggerState(0, 0);
  const ticks = Array.from({ length: 70 }, (_, i): Observation => rtt(i * 1000 + 500, 5));
  const all = [lan(10_000, own), lan(20_000, 'c2'), ...ticks.filter(({ atMs }) => atMs > 20_000)];
  assert.equal(feed(all, 'moved', state)[0]?.atMs, 60_500);
  const back = [...all.slice(0, 2), lan(20_400, own), ...all.slice(2)];
  assert.deepEqual(feed(back, 'moved', state), []);
});

test('a device that ping-pongs every 5 s moves its VM once, and again only when it has settled', () => {
  const flapping: Observation[] = [lan(0, own)];
  for (let i = 1; i <= 120; i += 1) {
    flapping.push(lan(i * 5000, i % 2 ? 'c2' : own));
    for (let t = 500; t < 5000; t += 500) flapping.push(rtt(i * 5000 + t, i % 2 ? 25 : 5));
  }
  const fired = feed(flapping, 'moved');
  assert.deepEqual(
    fired.map(({ atMs }) => atMs),
    [5000],
  );
  const settled = [
    ...flapping,
    lan(606_000, 'c2'),
    ...Array.from({ length: 80 }, (_, i) => rtt(606_500 + i * 500, 25)),
  ];
  assert.equal(feed(settled, 'moved').length, 2);
});

test('a cellular network between two LANs is no change of LAN', () => {
  const walk = [lan(0, own), lan(1000, undefined), lan(2000, 'c2')];
  assert.deepEqual(feed(walk, 'moved'), [{ atMs: 2000, kind: 'lan' }]);
});

test('whatever a device does, two migrations start at least a cool-down apart', () => {
  const step = fc.record({
    waitMs: fc.integer({ min: 1, max: 20_000 }),
    what: fc.oneof(
      fc.constantFrom('c1', 'c2', 'c3', undefined).map((id) => ({ lan: id })),
      fc.double({ min: 0, max: 500, noNaN: true }).map((ms) => ({ ms })),
      fc.constant('tick' as const),
    ),
  });
  fc.assert(
    fc.property(fc.array(step, { maxLength: 300 }), (steps) => {
      let atMs = 0;
      const observations = steps.map(({ waitMs, what }): Observation => {
        atMs += waitMs;
        if (what === 'tick') return { kind: 'tick', atMs };
        return 'ms' in what ? rtt(atMs, what.ms) : lan(atMs, what.lan);
      });
      const fired = feed(observations, 'moved');
      for (const [i, { atMs: at }] of fired.entries())
        if (i > 0) assert.ok(at - fired[i - 1]!.atMs >= policy.cooldownMs);
    }),
  );
});

test('an RTT that never passes the threshold never fires', () => {
  fc.assert(
    fc.property(fc.array(fc.double({ min: 0, max: policy.rttThresholdMs, noNaN: true })), (list) => {
      assert.deepEqual(
        feed(
          list.map((ms, i) => rtt(i * 1000, ms)),
          'moved',
        ),
        [],
      );
    }),
  );
});
