import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import type { MigrationInfo } from '../qmp/index.ts';
import { ProgressTracker } from './progress.ts';

const info = (transferred: number, remaining: number, round = 1): MigrationInfo => ({
  status: 'active',
  ram: {
    transferred,
    remaining,
    total: 1000,
    duplicate: 0,
    normal: 0,
    'normal-bytes': 0,
    'dirty-pages-rate': 3,
    'dirty-sync-count': round,
    mbps: 0,
    'page-size': 4096,
    'postcopy-requests': 0,
  },
});

test('whatever QEMU tells, nothing runs backwards and nothing ends before the end', () => {
  const step = fc.oneof(
    fc.record({ doneBytes: fc.nat(5000), totalBytes: fc.nat(5000) }),
    fc.tuple(fc.nat(5000), fc.nat(5000)),
  );
  fc.assert(
    fc.property(fc.array(step), (steps) => {
      let now = 0;
      const tracker = new ProgressTracker({ memoryBytes: 1000, diskBytes: 500 }, () => (now += 100));
      let before = tracker.progress;
      for (const one of steps) {
        if (Array.isArray(one)) tracker.memory(info(...one));
        else tracker.disk(one);
        const { fraction, doneBytes, totalBytes } = tracker.progress;
        assert.ok(fraction >= before.fraction && fraction < 1);
        assert.ok(doneBytes >= before.doneBytes && totalBytes >= doneBytes);
        before = tracker.progress;
      }
      tracker.enter('done');
      assert.equal(tracker.progress.fraction, 1);
    }),
  );
});

test('a phase that lies behind is not entered again', () => {
  const tracker = new ProgressTracker({ memoryBytes: 1000, diskBytes: 0 });
  tracker.enter('memory');
  tracker.enter('disk');
  assert.equal(tracker.progress.phase, 'memory');
});

test('the downtime is from the stop here to the word of the destination', () => {
  let now = 0;
  const tracker = new ProgressTracker({ memoryBytes: 1000, diskBytes: 0 }, () => now);
  assert.equal(tracker.result.downtimeMs, undefined);
  now = 40;
  tracker.paused();
  now = 90;
  tracker.resumed();
  tracker.enter('done');
  now = 500;
  assert.equal(tracker.result.downtimeMs, 50);
  assert.equal(tracker.result.totalMs, 90);
});

test('each phase lasts until the next one, and the switchover until the VM runs again', () => {
  let now = 0;
  const tracker = new ProgressTracker({ memoryBytes: 1000, diskBytes: 0 }, () => now);
  now = 10;
  tracker.enter('memory');
  now = 110;
  tracker.enter('switchover');
  now = 140;
  tracker.resumed();
  now = 300;
  tracker.enter('done');
  assert.deepEqual(tracker.result.phaseMs, { preflight: 10, memory: 100, switchover: 30 });
});

test('rate and ETA come from what moved, and are missing before anything has', () => {
  let now = 0;
  const tracker = new ProgressTracker({ memoryBytes: 3000, diskBytes: 0 }, () => now);
  tracker.memory(info(0, 3000));
  assert.equal(tracker.progress.etaMs, undefined);
  now = 1000;
  tracker.memory(info(1000, 2000, 2));
  assert.deepEqual(tracker.progress, {
    phase: 'preflight',
    fraction: 1 / 3,
    round: 2,
    doneBytes: 1000,
    totalBytes: 3000,
    dirtyBps: 2000 * 8,
    rateBps: 8000,
    etaMs: 2000,
  });
});
