import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { noRtt, observeRtt } from './rtt.ts';

const samples = fc.array(
  fc.oneof(fc.double({ min: 0, max: 5000, noNaN: true }), fc.constant('lost' as const)),
  {
    minLength: 1,
    maxLength: 60,
  },
);
const of = (list: readonly (number | 'lost')[]) =>
  list.reduce((stats, each, i) => observeRtt(stats, each, i), noRtt);

test('the smoothed RTT lies between the smallest and the largest answer', () => {
  fc.assert(
    fc.property(samples, (list) => {
      const answers = list.filter((each) => each !== 'lost');
      fc.pre(answers.length > 0);
      const { smoothedMs, minMs, samples: count } = of(list);
      assert.ok(smoothedMs >= Math.min(...answers) - 1e-6 && smoothedMs <= Math.max(...answers) + 1e-6);
      assert.equal(minMs, Math.min(...answers));
      assert.equal(count, answers.length);
    }),
  );
});

test('a steady path has no jitter and no loss', () => {
  const { jitterMs, lossRatio, smoothedMs } = of(Array(50).fill(20));
  assert.deepEqual([jitterMs, lossRatio, smoothedMs], [0, 0, 20]);
});

test('loss comes near to its share, and an answer ends the row of lost ones', () => {
  const half = of(Array.from({ length: 400 }, (_, i) => (i % 2 ? 'lost' : 10)));
  assert.ok(Math.abs(half.lossRatio - 0.5) < 0.05, String(half.lossRatio));
  assert.equal(of([1, 'lost', 'lost']).lostInRow, 2);
  assert.equal(of([1, 'lost', 'lost', 3]).lostInRow, 0);
});

test('jitter is told from a steady path of the same mean', () => {
  assert.ok(of(Array.from({ length: 100 }, (_, i) => (i % 2 ? 10 : 30))).jitterMs > 15);
});

test('a round trip that is no number is refused', () => {
  for (const bad of [-1, Number.NaN, Number.POSITIVE_INFINITY])
    assert.throws(() => observeRtt(noRtt, bad, 0), /wanted a number of at least 0/);
});
