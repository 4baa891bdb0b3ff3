import assert from 'node:assert/strict';
import { test } from 'node:test';
import { readCpuTime, ticksOf } from './cpu-time.ts';

test('user and system time are added, whatever the name of the thread', () => {
  const rest = 'S 1 2 3 0 -1 4194560 1 2 3 4 250 50 0 0 20 0 9 0 12345';
  assert.equal(ticksOf(`77 (CPU 0/TCG) ${rest}`), 300);
  assert.equal(ticksOf(`77 (a) b (c)) ${rest}`), 300);
});

test('our own process has spent time, none of it on vCPUs', () => {
  const end = performance.now() + 50;
  while (performance.now() < end);
  const time = readCpuTime(process.pid);
  assert.ok(time!.otherMs > 0);
  assert.equal(time!.vcpuMs, 0);
});

test('a process that is gone has no time', () => {
  assert.equal(readCpuTime(2 ** 30), undefined);
});
