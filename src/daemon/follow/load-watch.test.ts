import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { test } from 'node:test';
import { parseMemory, parseStat, processTicks } from './load-watch.ts';

test('busy is all that is neither idle nor waiting for a disk', () => {
  const text = 'cpu  100 20 30 800 40 5 5 0 0 0\ncpu0 1 2 3 4 5 6 7 8 9 10\nintr 5\n';
  assert.deepEqual(parseStat(text), { busyTicks: 160, allTicks: 1000 });
});

test('memory in use is what is not available', () => {
  const { memory, totalMemoryBytes } = parseMemory(
    'MemTotal:       1000 kB\nMemFree: 1 kB\nMemAvailable:    250 kB\n',
  );
  assert.deepEqual([memory, totalMemoryBytes], [0.75, 1_024_000]);
});

test('ticks of a process are read behind a name with blanks and parentheses', () => {
  assert.equal(processTicks('7 (a (b) c) S 1 7 7 0 -1 4194304 1 2 3 4 30 12 0 0 20 0 1 0 5 6 7'), 42);
  assert.equal(processTicks(''), undefined);
});

test('this machine says what it says', () => {
  const { busyTicks, allTicks } = parseStat(readFileSync('/proc/stat', 'utf8'));
  assert.ok(busyTicks > 0 && allTicks > busyTicks);
  assert.ok(processTicks(readFileSync('/proc/self/stat', 'utf8'))! >= 0);
  const { memory } = parseMemory(readFileSync('/proc/meminfo', 'utf8'));
  assert.ok(memory > 0 && memory < 1);
});
