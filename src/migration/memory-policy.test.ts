import assert from 'node:assert/strict';
import { test } from 'node:test';
import { MiB } from '../model/units.ts';
import {
  isTimeForPostcopy,
  nearlyNothingBytes,
  pauseMs,
  type Round,
  switchoverBytes,
} from './memory-policy.ts';

const rounds = (...remainingMiB: number[]): Round[] =>
  remainingMiB.map((mib, index) => ({ number: index + 1, remainingBytes: mib * MiB }));

test('pre-copy never goes over to post-copy, and post-copy does with its first round', () => {
  assert.equal(isTimeForPostcopy('precopy', rounds(100, 100, 100, 100, 100)), false);
  assert.equal(isTimeForPostcopy('postcopy', []), false);
  assert.equal(isTimeForPostcopy('postcopy', rounds(100)), true);
});

test('a hybrid goes over after two whole rounds', () => {
  assert.equal(isTimeForPostcopy('hybrid', rounds(100, 50)), false);
  assert.equal(isTimeForPostcopy('hybrid', rounds(100, 50, 25)), true);
});

test('auto stays with pre-copy as long as rounds shrink the work', () => {
  assert.equal(isTimeForPostcopy('auto', rounds(1000, 500, 250, 125, 62)), false);
});

test('auto goes over when two rounds in a row hardly shrink it, but not for one burst', () => {
  assert.equal(isTimeForPostcopy('auto', rounds(1000, 300, 290, 120)), false);
  assert.equal(isTimeForPostcopy('auto', rounds(1000, 300, 290, 280)), true);
});

test('where the speed of the link is known, auto goes over as soon as a round would take as long as the one before', () => {
  const round = (number: number, atMs: number, forecastMs: number) => ({
    number,
    remainingBytes: 1,
    atMs,
    forecastMs,
  });
  const first = round(1, 0, 9000);
  assert.equal(isTimeForPostcopy('auto', [first, round(2, 8000, 900)]), false);
  assert.equal(isTimeForPostcopy('auto', [first, round(2, 8000, 7000)]), true);
  assert.equal(isTimeForPostcopy('auto', [first, round(2, 8000, 900), round(3, 9000, 450)]), false);
  assert.equal(isTimeForPostcopy('auto', [first, round(2, 8000, 900), round(3, 9000, 800)]), true);
  assert.equal(isTimeForPostcopy('precopy', [first, round(2, 8000, 7000)]), false);
});

test('a VM goes over when it is known what is hot, and in the end whatever it does', () => {
  assert.equal(switchoverBytes(undefined), nearlyNothingBytes);
  assert.ok(switchoverBytes(0) > nearlyNothingBytes);
  assert.ok(switchoverBytes(2000) > switchoverBytes(0) * 1000);
});

test('a pre-copy whose rounds get shorter makes a short pause, and the long one it may make only when they do not', () => {
  assert.equal(pauseMs('precopy', rounds(1000), 300), 40);
  assert.equal(pauseMs('precopy', rounds(1000, 300, 100), 300), 40);
  assert.equal(pauseMs('precopy', rounds(1000, 300, 290), 300), 40);
  assert.equal(pauseMs('precopy', rounds(1000, 300, 290, 280), 300), 300);
  assert.equal(pauseMs('precopy', rounds(1000, 300, 290, 280), 20), 20);
  // What is left comes after the VM runs again.
  assert.equal(pauseMs('auto', rounds(1000, 300, 290, 280), 300), 40);
});
