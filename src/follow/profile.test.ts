import assert from 'node:assert/strict';
import { test } from 'node:test';
import type { ProfileSample } from '../model/follow.ts';
import { correct, learnMs, mergeSamples, samplesKept } from './profile.ts';

/** A world in which the model is wrong in a way that depends on the VM: setup costs, zero pages, noise. */
function migrationOf(index: number, seed = 7): ProfileSample {
  let state = (seed * 2654435761 + index * 40503) >>> 0;
  const random = () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 32;
  };
  for (let i = 0; i < 5; i += 1) random();
  const memoryBytes = [128, 256, 512, 1024][Math.floor(random() * 4)]! * 2 ** 20;
  const bandwidthBps = [60e6, 100e6, 350e6][Math.floor(random() * 3)]!;
  const dirtyBps = random() * bandwidthBps * 0.5;
  const modelTotalMs = (memoryBytes * 8 * 1000) / (bandwidthBps - dirtyBps);
  const modelDowntimeMs = 80 + 100 * random();
  const noise = () => 0.9 + 0.2 * random();
  return {
    migrationId: `${seed}-${index}`,
    at: new Date(index * 1000).toISOString(),
    peerId: random() < 0.5 ? 'c2' : 'c3',
    way: 'direct precopy',
    memoryBytes,
    diskBytes: 0,
    dirtyBps,
    bandwidthBps,
    rttMs: 20,
    modelTotalMs,
    modelDowntimeMs,
    totalMs: (2500 + 0.35 * modelTotalMs) * noise(),
    downtimeMs: 2.5 * modelDowntimeMs * noise(),
  };
}

const median = (values: number[]) => values.toSorted((a, b) => a - b)[Math.floor(values.length / 2)]!;
const errors = (past: ProfileSample[], next: ProfileSample[], what: 'totalMs' | 'downtimeMs') =>
  median(next.map((each) => Math.abs(correct(each, past)[what] - each[what]) / each[what]));

test('without any sample the forecast is the model', () => {
  const query = migrationOf(0);
  const { totalMs, downtimeMs, learnedFrom } = correct(query, []);
  assert.deepEqual(
    [totalMs, downtimeMs, learnedFrom],
    [Math.round(query.modelTotalMs), Math.round(query.modelDowntimeMs), 0],
  );
});

test('after 20 migrations the median error is below 25 %, where the model alone is far off', () => {
  for (let seed = 1; seed <= 20; seed += 1) {
    const past = Array.from({ length: 20 }, (_, i) => migrationOf(i, seed));
    const next = Array.from({ length: 20 }, (_, i) => migrationOf(20 + i, seed));
    for (const what of ['totalMs', 'downtimeMs'] as const) {
      assert.ok(errors(past, next, what) < 0.25, `seed ${seed}: ${what} ${errors(past, next, what)}`);
    }
    assert.ok(errors([], next, 'totalMs') > 0.25, 'the model alone must be worse, or the test shows nothing');
  }
});

test('what a downtime has beside the last bytes is learned apart from these', () => {
  const query = { ...migrationOf(0), modelDowntimeMs: 100 };
  const past = [...Array(20)].map((_, i) => {
    const lastBytesMs = 10 * i;
    const [modelDowntimeMs, downtimeMs] = [80 + lastBytesMs, 200 + lastBytesMs];
    return { ...query, migrationId: String(i), modelDowntimeMs, downtimeMs };
  });
  assert.equal(correct(query, past).downtimeMs, 220);
});

test('a link that changes for good is learned anew', () => {
  const query = migrationOf(0);
  const was = (times: number, i: number) => ({
    ...query,
    migrationId: String(i),
    totalMs: query.modelTotalMs * times,
  });
  const past = [...Array(60)].map((_, i) => was(1, i));
  const now = [...Array(40)].map((_, i) => was(3, 100 + i));
  const { totalMs } = correct(query, [...past, ...now]);
  assert.ok(totalMs > 2.5 * query.modelTotalMs, String(totalMs / query.modelTotalMs));
});

test('one odd migration does not carry the forecast away', () => {
  const query = migrationOf(0);
  const usual = [...Array(6)].map((_, i) => ({
    ...query,
    migrationId: String(i),
    totalMs: query.modelTotalMs,
  }));
  const odd = { ...query, migrationId: 'odd', totalMs: query.modelTotalMs * 50 };
  assert.equal(correct(query, [...usual, odd]).totalMs, Math.round(query.modelTotalMs));
});

test('profiles of two cloudlets become one, each migration once, our own word first, bounded', () => {
  const mine = { ...migrationOf(1), totalMs: 5000 };
  const merged = mergeSamples([mine], [{ ...mine, totalMs: 9999 }, migrationOf(2)]);
  assert.deepEqual(
    merged.map(({ totalMs }) => totalMs),
    [5000, migrationOf(2).totalMs],
  );
  const many = Array.from({ length: samplesKept + 10 }, (_, i) => migrationOf(i));
  assert.equal(mergeSamples(many, []).length, samplesKept);
});

test('a sample that cannot be true teaches nothing', () => {
  const sample = migrationOf(1);
  const absurd = [
    { ...sample, modelTotalMs: 0 },
    { ...sample, totalMs: sample.modelTotalMs * 1000 },
    { ...sample, downtimeMs: Number.NaN },
  ];
  assert.deepEqual(mergeSamples([], absurd), []);
});

test('a running estimate follows what is measured', () => {
  assert.equal(learnMs(undefined, 100), 100);
  assert.equal(learnMs(100, 200), 125);
});
