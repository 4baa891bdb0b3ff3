import assert from 'node:assert/strict';
import { test } from 'node:test';
import type { MigrationInfo } from '../qmp/index.ts';
import { DirtyMeter } from './dirtying.ts';

const info = (pass: number, remaining: number, pagesPerSecond = 0): MigrationInfo => ({
  status: 'active',
  ram: {
    transferred: 0,
    remaining,
    total: 1e9,
    duplicate: 0,
    normal: 0,
    'normal-bytes': 0,
    'dirty-pages-rate': pagesPerSecond,
    'dirty-sync-count': pass,
    mbps: 0,
    'page-size': 4096,
    'postcopy-requests': 0,
  },
});

test('what is left when a pass begins was dirtied during the one before', () => {
  const meter = new DirtyMeter();
  meter.note(info(1, 1e9), 0);
  meter.note(info(1, 5e8), 500);
  meter.note(info(2, 1e6), 1000);
  meter.note(info(3, 3e6), 2000);
  assert.deepEqual([meter.latestBps, meter.maxBps, meter.meanBps], [24e6, 24e6, 16e6]);
});

test("QEMU's own rate counts for the highest, and is the mean where no pass was measured", () => {
  const meter = new DirtyMeter();
  meter.note(info(1, 1e9, 1000), 0);
  assert.deepEqual([meter.maxBps, meter.meanBps], [32_768_000, 32_768_000]);
  meter.note(info(2, 1e6), 1000);
  assert.deepEqual([meter.maxBps, meter.meanBps], [32_768_000, 8e6]);
});

test('the end of a migration, at which QEMU tells 0, takes nothing back', () => {
  const meter = new DirtyMeter();
  meter.note(info(1, 1e9, 1000), 0);
  meter.note({ ...info(4, 0), status: 'completed' }, 5000);
  assert.equal(meter.latestBps, 32_768_000);
});

test('a pass that was missed or too short to measure is left out', () => {
  const meter = new DirtyMeter();
  meter.note(info(1, 1e9), 0);
  meter.note(info(4, 1e6), 1000);
  meter.note(info(5, 1e6), 1001);
  assert.deepEqual([meter.latestBps, meter.maxBps, meter.meanBps], [0, 0, 0]);
});
