import assert from 'node:assert/strict';
import { test } from 'node:test';
import { sumOfDivisions, sumOfMerges } from './statistics.ts';

test('what relays have of memory and of a disk is counted by relay, and nothing of either changes', () => {
  const memory = {
    replicas: 2,
    slabs: 3,
    zeroPages: 5,
    alikePages: 1,
    relays: [{ name: 'r1', slabs: 3, bytes: 30 }],
  };
  const disk = {
    replicas: 2,
    slabs: 4,
    zeroPages: 0,
    alikePages: 0,
    relays: [
      { name: 'r2', slabs: 4, bytes: 400 },
      { name: 'r1', slabs: 4, bytes: 401 },
    ],
  };
  const before = structuredClone([memory, disk]);
  assert.deepEqual(sumOfDivisions(memory, disk), {
    replicas: 2,
    slabs: 7,
    zeroPages: 5,
    alikePages: 1,
    relays: [
      { name: 'r1', slabs: 7, bytes: 431 },
      { name: 'r2', slabs: 4, bytes: 400 },
    ],
  });
  assert.deepEqual([memory, disk], before);
});

test('faults are those of memory', () => {
  const memory = { slabs: 1, bytes: 10, faults: 7, faultMedianMs: 3, wrong: 1, refetched: 0 };
  const disk = { slabs: 2, bytes: 20, faults: 9, faultMedianMs: 5, wrong: 0, refetched: 4 };
  const both = { slabs: 3, bytes: 30, faults: 7, faultMedianMs: 3, wrong: 1, refetched: 4 };
  assert.deepEqual(sumOfMerges(memory, disk), both);
});
