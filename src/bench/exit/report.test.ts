import assert from 'node:assert/strict';
import { test } from 'node:test';
import { csvOf, figuresOf, markdownOf, type Run, rowsOf } from './report.ts';

const run = (more: Partial<Run>): Run => ({
  at: '2026-01-01T00:00:00.000Z',
  commit: 'abc',
  load: 1,
  part: 'engines',
  place: 'lab',
  wanted: { engine: 'relayed', mode: 'postcopy', relays: 3, replicas: 2 },
  rates: { uplinkMbps: 40, destinationMbps: 4, relayMbps: 80 },
  rttMs: 20,
  vms: 1,
  exitMs: 10_000,
  totalMs: 90_000,
  downtimeMs: 1000,
  sentBytes: 40_000_000,
  merge: { slabs: 300, bytes: 40_000_000, faults: 100, faultMedianMs: 30, wrong: 0, refetched: 0 },
  throughput: [
    { at: 250, value: 4 },
    { at: 500, value: 2 },
  ],
  ...more,
});
const direct = run({
  wanted: { engine: 'direct', mode: 'postcopy', relays: 0, replicas: 0 },
  exitMs: 240_000,
  totalMs: 240_000,
});

test('a row is the median of its runs at the commit at which it was measured last, held against the uplink', () => {
  const old = run({ commit: 'old', at: '2025-01-01T00:00:00.000Z', exitMs: 90_000 });
  const [row, other] = rowsOf([old, ...[9000, 8000, 12_000].map((exitMs) => run({ exitMs })), direct]);
  assert.deepEqual([row!.runs.length, row!.exitMs, row!.ofIdeal], [3, 9000, 9000 / 8000]);
  assert.equal(other!.run.wanted.engine, 'direct');
});

test('each part has its table and its drawing, and the guest of the relayed move a line', () => {
  const { merge: _, ...unmerged } = direct;
  const runs = [run({}), { ...unmerged, at: direct.at }, run({ part: 'vms', vms: 3 })];
  const figures = figuresOf(runs);
  assert.deepEqual(Object.keys(figures), [
    'bench-exit-engines.svg',
    'bench-exit-vms.svg',
    'bench-exit-throughput.svg',
  ]);
  const text = markdownOf(runs, ['# Title'], Object.keys(figures));
  assert.match(text, /direct postcopy +\| +1 \| +40, 4, 80 \| +240\.0 \| +30\.00 \| +240\.0 \|/);
  assert.match(text, /100, 30 \(1\.5\)/);
  assert.match(text, /## Several VMs at once[^#]*bench-exit-vms\.svg/);
  assert.doesNotMatch(text + Object.values(figures).join(''), /NaN|undefined/);
});

test('one that was called off says so, and a guest that writes has rows and a drawing of its own', () => {
  const { totalMs: _, ...calledOff } = run({
    wanted: { engine: 'direct', mode: 'precopy', relays: 0, replicas: 0 },
    exitMs: 280_000,
    isCalledOff: true,
  });
  const runs = [run({}), run({ does: 'writes' }), calledOff];
  const figures = Object.keys(figuresOf(runs));
  const text = markdownOf(runs, ['# Title'], figures);
  assert.match(text, /direct precopy +\| +1 \| +40, 4, 80 \| +not after 280\.0 \| +\| +\| +\|/);
  assert.match(text, /2 replicas, guest writes +\|/);
  assert.match(text, /throughput\.svg[^#]*throughput-writes\.svg/);
});

test('the CSV has a row for each run and a value for each column', () => {
  const [head, ...rows] = csvOf([run({}), direct])
    .trim()
    .split('\n');
  assert.deepEqual(
    rows.map((row) => row.split(',').length),
    [head, head].map((each) => each!.split(',').length),
  );
});
