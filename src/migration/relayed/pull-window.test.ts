import assert from 'node:assert/strict';
import { test } from 'node:test';
import { PullWindow } from './pull-window.ts';

/** How many slabs are on their way in the end, in the mean, over a link that takes each for `slabMs`, one after the other. */
function pull(window: PullWindow, rttMs: number, slabMs: number, slabs = 3000): number {
  let linkFreeAt = 0;
  const arrivals: { at: number; sentAt: number; wasAlone: boolean }[] = [];
  let now = 0;
  let sum = 0;
  for (let sent = 0; sent < slabs; ) {
    while (arrivals.length < window.slabs) {
      linkFreeAt = Math.max(linkFreeAt, now) + slabMs;
      arrivals.push({ sentAt: now, at: linkFreeAt + rttMs, wasAlone: arrivals.length === 0 });
      sent += 1;
    }
    if (sent > slabs / 2) sum += arrivals.length;
    const { at, sentAt, wasAlone } = arrivals.shift()!;
    now = at;
    window.note(at - sentAt, wasAlone);
  }
  return (2 * sum) / slabs;
}

test('it fills a link with a long way, and queues little before a slow one', () => {
  const far = pull(new PullWindow(), 100, 5);
  assert.ok(far > 20, `${far} slabs on a link that holds 21`);
  const slow = pull(new PullWindow(), 10, 20);
  assert.ok(slow < 4, `${slow} slabs before a link that holds one and a half`);
});

test('it follows a path that changes', () => {
  const window = new PullWindow();
  assert.ok(pull(window, 100, 5) > 20);
  assert.ok(pull(window, 5, 20) < 5);
  assert.ok(pull(window, 100, 5) > 18);
});

test('between two pages that a guest asks for a slow link carries little, a fast one a slab, and each may become the other', () => {
  const window = new PullWindow();
  assert.deepEqual([window.isSlow, window.partsBetween(8)], [false, 8], 'nobody knows yet');
  for (let turn = 0; turn < 20; turn++) window.noteParts(8, 240);
  assert.deepEqual([window.isSlow, window.partsBetween(8)], [true, 1]);
  for (let turn = 0; turn < 20; turn++) window.noteParts(1, 2);
  assert.deepEqual([window.isSlow, window.partsBetween(8)], [false, 8]);
  window.noteParts(1, -5);
  assert.equal(window.isSlow, false, 'sooner than the way there and back ever was');
});

test('it stays within bounds, whatever it is told', () => {
  const window = new PullWindow();
  for (let turn = 0; turn < 5000; turn++) {
    window.note(Math.random() * 10 ** (turn % 6), turn % 97 === 0);
    assert.ok(window.slabs >= 1 && window.slabs <= 32);
    assert.ok(window.typicalMs >= 0);
  }
});
