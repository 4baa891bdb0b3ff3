import assert from 'node:assert/strict';
import { test } from 'node:test';
import { PageHeat } from './page-heat.ts';
import { PageSet } from './page-set.ts';

const pages = 1000;
const range = (first: number, count: number): number[] => Array.from({ length: count }, (_, i) => first + i);

/** Four rounds, in which these pages were written so often. */
function heatOf(written: ReadonlyMap<number, number>): PageHeat {
  const heat = new PageHeat(pages);
  heat.note(999);
  heat.begin();
  heat.noteRounds(4);
  for (const [page, times] of written) for (let time = 0; time < times; time += 1) heat.note(page);
  return heat;
}

function pendingOf(...some: readonly number[][]): PageSet {
  const pending = new PageSet(pages);
  for (const page of some.flat()) pending.add(page);
  return pending;
}

test('what is written most often is hot, the hottest first, as far as it is pending', () => {
  const heat = heatOf(
    new Map([
      [7, 1],
      [8, 3],
      [30, 2],
      [31, 4],
    ]),
  );
  assert.deepEqual(heat.hot(pendingOf([7, 8, 9, 30], [999])), [8, 30, 7]);
});

test('a long stretch that is worked through once is not hot, and one that is written all the time is', () => {
  const once = range(100, 200);
  const always = range(400, 200);
  const heat = heatOf(
    new Map([...once.map((page) => [page, 1] as const), ...always.map((page) => [page, 3] as const)]),
  );
  assert.deepEqual(heat.hot(pendingOf(once, always)), always);
  // One page of a long stretch that is pending is hot by itself.
  assert.deepEqual(heatOf(new Map([[150, 1]])).hot(pendingOf(once)), [150]);
});

test('what is scattered and was not written lately comes by the length of its runs, and no long run of it', () => {
  const heat = heatOf(new Map([[20, 1]]));
  const pending = pendingOf(range(0, 3), [10], [20], range(500, 65));
  assert.deepEqual(heat.scattered(pending), [10, 0, 1, 2]);
});
