import assert from 'node:assert/strict';
import { test } from 'node:test';
import { longestSilence } from './silence.ts';

test('a silence counts if any part of it lies in the span', () => {
  const times = [0, 10, 400, 410, 900];
  assert.equal(longestSilence(times, { fromMs: 100, toMs: 200 }), 390);
  assert.equal(longestSilence(times, { fromMs: 0, toMs: 5 }), 10);
  assert.equal(longestSilence(times, { fromMs: 401, toMs: 600 }), 490);
  assert.equal(longestSilence([], { fromMs: 0, toMs: 5 }), 0);
});
