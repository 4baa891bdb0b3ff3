import assert from 'node:assert/strict';
import { test } from 'node:test';
import { MiB } from '../model/units.ts';
import { StallWatch } from './mirror-policy.ts';

/** MiB copied until it is said to stall, or `undefined`: the guest writes `written` MiB while the link copies one. */
function stallsAt(restMiB: number, written: (copied: number) => number): number | undefined {
  const watch = new StallWatch();
  let rest = restMiB;
  for (let copied = 0; rest > 0 && copied < 10_000; copied += 1) {
    if (watch.hasStalled({ doneBytes: copied * MiB, totalBytes: (copied + rest) * MiB })) return copied;
    rest += written(copied) - 1;
  }
  return undefined;
}

test('a mirror that catches up is left alone, also with a guest that writes', () => {
  assert.equal(
    stallsAt(1000, () => 0),
    undefined,
  );
  assert.equal(
    stallsAt(1000, () => 0.9),
    undefined,
  );
});

test('a burst is no stall', () => {
  assert.equal(
    stallsAt(1000, (copied) => (copied > 100 && copied < 150 ? 2 : 0)),
    undefined,
  );
});

test('a guest that writes as fast as the link copies, or faster, is a stall once an eighth of the rest was copied in vain', () => {
  assert.equal(
    stallsAt(1000, () => 1),
    126,
  );
  assert.equal(
    stallsAt(1000, () => 3),
    126,
  );
  assert.equal(
    stallsAt(4, () => 1),
    17,
  );
});

test('a link that is cut is no stall, however long', () => {
  const watch = new StallWatch();
  for (let look = 0; look < 10_000; look += 1)
    assert.equal(watch.hasStalled({ doneBytes: 5 * MiB, totalBytes: (10 + look) * MiB }), false);
});
