import assert from 'node:assert/strict';
import { test } from 'node:test';
import { barChart } from '../svg.ts';
import { type Cell, parseWanted } from './grid.ts';
import type { Run } from './measured.ts';
import { csvOf, markdownOf, physicsMs, rowsOf } from './report.ts';

const cell: Cell = { rateMbps: 60, rttMs: 20, writerMBps: 0, holds: 'image' };
const run = (more: Partial<Run>): Run => ({
  at: '2026-01-01T00:00:00.000Z',
  commit: 'abc',
  load: 1,
  cell,
  mover: 'condensed',
  converged: true,
  totalMs: 8000,
  gapMs: 200,
  calmGapMs: 20,
  wireBytes: 45_000_000,
  cpuMs: { source: 1000, destination: 2000 },
  ...more,
});
const minimum = {
  nonZeroPages: 1000,
  unique: { image: { pages: 100, bytes: 45_000_000 }, golden: { pages: 50, bytes: 15_000_000 } },
};

test('the corners are the grid unless all of it is asked for, and a cell can be chosen', () => {
  assert.equal(parseWanted([]).cells.length, 2 * 2 * 3);
  assert.equal(parseWanted(['--full']).cells.length, 3 * 4 * 3);
  const one = ['--rates', '60', '--rtts', '20', '--writers', '0', '--movers', 'condensed,precopy'];
  assert.deepEqual(parseWanted(one).cells, [cell]);
  const chosen = parseWanted(['--cells', '60/20/0,350/150/8/golden']).cells;
  assert.deepEqual(chosen, [cell, { rateMbps: 350, rttMs: 150, writerMBps: 8, holds: 'golden' }]);
  assert.throws(() => parseWanted(['--cells', '60/20']), /--cells/);
  assert.throws(() => parseWanted(['--movers', 'magic']), /--movers has 'magic', wanted some of precopy/);
  assert.throws(() => parseWanted(['--rates', 'x']), /--rates has 'x'/);
});

test('runs of one cell and mover are one row, with medians; what does not converge once, never does', () => {
  const runs = [8000, 6000, 7000].map((totalMs) => run({ totalMs }));
  const [row, other] = rowsOf([...runs, run({ mover: 'precopy', converged: false })]);
  assert.deepEqual([row!.mover, row!.converged], ['precopy', false]);
  assert.deepEqual([other!.mover, other!.totalMs, other!.runs.length], ['condensed', 7000, 3]);
  const [newest] = rowsOf([...runs, run({ totalMs: 5000, commit: 'def', at: '2026-01-02T00:00:00.000Z' })]);
  assert.deepEqual([newest!.totalMs, newest!.runs.length], [5000, 1]);
});

test('the table holds Viper against stock QEMU and against what the link leaves', () => {
  assert.equal(physicsMs(cell, minimum), 6000 + 80);
  const text = markdownOf([run({}), run({ mover: 'precopy', totalMs: 104_000 })], minimum, ['# Title']);
  const [line] = text.split('\n').filter((each) => each.includes('Viper condensed, image'));
  assert.deepEqual(
    line!
      .split('|')
      .slice(1, -1)
      .map((each) => each.trim()),
    [
      '60M 20 ms',
      'Viper condensed, image',
      '8.00',
      '13.0',
      '1.32',
      '200',
      '230',
      '45.0',
      '1.00',
      '2.00',
      '1, 1.0',
    ],
  );
});

test('the CSV has a row for each run and a value for each column', () => {
  const [head, ...rows] = csvOf([run({}), run({ mover: 'postcopy', rounds: 3 })])
    .trim()
    .split('\n');
  assert.deepEqual(
    rows.map((row) => row.split(',').length),
    [head, head].map((each) => each!.split(',').length),
  );
});

test('a chart has a bar for each value, an empty one for what has none, and no markup out of labels', () => {
  const bars = [
    { label: 'a<b', value: 12 },
    { label: 'c', value: undefined, note: 'never' },
  ];
  const svg = barChart({ title: 'T & U', subtitle: '', unit: 's', groups: [{ label: 'g', bars }] });
  assert.equal(svg.match(/stroke-dasharray/g)?.length, 1);
  assert.ok(svg.includes('never') && svg.includes('a&lt;b') && svg.includes('T &amp; U'));
  assert.ok(!svg.includes('NaN') && !svg.includes('a<b'));
});
