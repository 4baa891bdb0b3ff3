import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { newId } from '../../model/ids.ts';
import { newKey } from '../../relay/index.ts';
import { BlockTable } from '../../stream/index.ts';
import { PageSet } from '../condensed/page-set.ts';
import {
  type Division,
  encodeAlike,
  encodeDivision,
  encodeSlab,
  mostPages,
  parseAlike,
  parseBorrowed,
  parseDivision,
  parseRuns,
  parseSlab,
  parseStale,
  partOf,
  rangeOf,
  type Slab,
} from './division.ts';
import { Manifest } from './manifest.ts';

const division: Division = {
  migrationId: newId(),
  key: newKey(),
  group: 'ab'.repeat(32),
  relays: [newId(), newId(), newId()],
  replicas: 2,
  partPages: 8,
};
const table = new BlockTable([{ name: 'pc.ram', sizeBytes: 4096 * 1000 }]);
const layout = { sectionId: 2, table };
const bodyOf = (frame: Buffer): Buffer => frame.subarray(5);

test('a division comes out as it went in; nothing else is one', () => {
  assert.deepEqual(parseDivision(bodyOf(encodeDivision(division))), division);
  const wrong: Record<string, unknown>[] = [
    { key: 'short' },
    { group: 'AB'.repeat(32) },
    { relays: ['edge2'] },
    { relays: Array.from({ length: 33 }, () => newId()) },
    { replicas: 0 },
    { partPages: 0 },
    { partPages: 1000 },
    { migrationId: '../..' },
  ];
  const json = JSON.parse(bodyOf(encodeDivision(division)).toString());
  for (const change of wrong)
    assert.throws(
      () => parseDivision(Buffer.from(JSON.stringify({ ...json, ...change }))),
      /a division that is none/,
    );
  for (const text of ['', 'null', '[]', '{'])
    assert.throws(() => parseDivision(Buffer.from(text)), /The agent/);
});

test('slabs come out as they went in, cut anywhere they are none', () => {
  const run = fc.tuple(fc.integer({ min: 0, max: 900 }), fc.integer({ min: 1, max: 100 }));
  const slabs = fc
    .record({
      slab: fc.integer({ min: 1, max: 2 ** 32 - 1 }),
      holders: fc.uniqueArray(fc.integer({ min: 0, max: 2 }), { minLength: 1, maxLength: 3 }),
      runs: fc.array(run, { minLength: 1, maxLength: 5 }),
      bytes: fc.integer({ min: 1, max: 16_000 }),
    })
    .map(({ slab, holders, runs, bytes }): Slab => {
      const pages = runs.reduce((sum, [, count]) => sum + count, 0);
      const parts = Array.from({ length: Math.ceil(pages / 8) }, (_, index) => bytes + index);
      return { slab, parts, holders, runs };
    });
  fc.assert(
    fc.property(slabs, (slab) => assert.deepEqual(parseSlab(bodyOf(encodeSlab(slab)), 1000, division), slab)),
  );
  const wire = bodyOf(encodeSlab({ slab: 1, parts: [500, 40], holders: [0, 2], runs: [[700, 10]] }));
  for (let end = 0; end < wire.length; end++)
    assert.throws(() => parseSlab(wire.subarray(0, end), 1000, division), /The agent/, `${end} bytes`);
  assert.throws(() => parseSlab(wire, 705, division), /a run of 10 pages from 700/);
  const fewer = { ...division, relays: division.relays.slice(0, 2) };
  assert.throws(() => parseSlab(wire, 1000, fewer), /that the relays 0, 2 hold/);
  assert.throws(() => parseSlab(wire, 1000, { ...division, partPages: 10 }), /10 pages in 2 parts/);
  const large = bodyOf(encodeSlab({ slab: 1, parts: [2e6], holders: [0], runs: [[0, 1]] }));
  assert.throws(() => parseSlab(large, 1000, division), /1 pages in 1 parts/);
  assert.throws(() => parseRuns(Buffer.of(0, 0), 1000), /a run of 0 pages/);
});

test('a page lies in the part that the order of the runs gives it', () => {
  const slab: Slab = {
    slab: 1,
    parts: [100, 20, 3],
    holders: [0],
    runs: [
      [50, 6],
      [10, 12],
    ],
  };
  assert.deepEqual(
    [50, 55, 10, 11, 12, 19, 20, 21].map((page) => partOf(slab, page, 8)),
    [0, 0, 0, 0, 1, 1, 2, 2],
  );
  assert.throws(() => partOf(slab, 9, 8), /Bug/);
  assert.deepEqual(rangeOf(slab, 0, 2), { at: 0, length: 123 });
  assert.deepEqual(rangeOf(slab, 1, 1), { at: 100, length: 20 });
});

test('a page is in the last slab that has it, or zero, or nobody knows', () => {
  const manifest = new Manifest(division, layout);
  manifest.add({
    slab: 1,
    parts: [10, 10],
    holders: [0, 1],
    runs: [
      [0, 10],
      [20, 5],
    ],
  });
  manifest.add({ slab: 2, parts: [10, 10], holders: [1, 2], runs: [[5, 10]] });
  manifest.addZeroes([[100, 900]]);
  assert.equal(manifest.whereIs(4)?.slab.slab, 1);
  assert.equal(manifest.whereIs(7)?.slab.slab, 2);
  assert.equal(manifest.whereIs(100), undefined);
  const missing = new PageSet(1000);
  missing.addRange(0, 15);
  missing.addRange(500, 100);
  assert.equal(manifest.firstUncovered(missing), -1);
  missing.add(17);
  assert.equal(manifest.firstUncovered(missing), 17);
  assert.throws(() => manifest.add({ slab: 2, parts: [1], holders: [0], runs: [[0, 1]] }), /slab 2 twice/);
});

test('of stale pages no earlier slab is good, whether it was told of before or comes late', () => {
  const manifest = new Manifest(division, layout);
  manifest.add({ slab: 1, parts: [10, 10], holders: [0, 1], runs: [[0, 10]] });
  manifest.addZeroes([[100, 5]]);
  manifest.addStale({
    slab: 3,
    runs: [
      [5, 2],
      [20, 1],
      [101, 1],
    ],
  });
  manifest.add({ slab: 2, parts: [10], holders: [0, 1], runs: [[20, 3]] });
  assert.deepEqual(
    [4, 5, 6, 7, 20, 21, 100, 101].map((page) => manifest.covers(page)),
    [true, false, false, true, false, true, true, false],
  );
  manifest.add({ slab: 4, parts: [10], holders: [0, 1], runs: [[5, 1]] });
  // An earlier one that comes late.
  manifest.add({ slab: 3, parts: [10], holders: [0, 1], runs: [[4, 2]] });
  assert.deepEqual([manifest.whereIs(4)?.slab.slab, manifest.whereIs(5)?.slab.slab], [3, 4]);
  assert.deepEqual(
    [manifest.isGood(5, 1), manifest.isGood(5, 3), manifest.isGood(4, 1)],
    [false, true, true],
  );
  const read = Manifest.fromBytes(manifest.toBytes());
  for (let page = 0; page < 120; page++) {
    assert.equal(read.whereIs(page)?.slab.slab, manifest.whereIs(page)?.slab.slab, `page ${page}`);
    assert.equal(read.zeroes.has(page), manifest.zeroes.has(page), `page ${page}`);
  }
  assert.throws(() => manifest.addStale({ slab: 9, runs: [] }), /stale pages twice/);
  assert.throws(() => parseStale(Buffer.alloc(3), 1000), /stale pages without a slab/);
});

test('a page that is like one in a slab is there, as long as nothing newer is said of it', () => {
  const manifest = new Manifest(division, layout);
  const alike = {
    number: 2,
    pages: [20, 21, 900, 3].map((page) => ({ page, slab: 1, like: page === 3 ? 5 : 4 })),
  };
  assert.deepEqual(parseAlike(bodyOf(encodeAlike(alike)), 1000), alike);
  assert.throws(() => parseAlike(bodyOf(encodeAlike(alike)), 900), /page 900 like 4/);
  assert.throws(() => parseAlike(Buffer.alloc(2), 900), /alike pages without a number/);
  manifest.addAlike(alike);
  assert.equal(manifest.covers(20), false, 'the slab may come later');
  manifest.add({ slab: 1, parts: [10, 10], holders: [0, 1], runs: [[0, 10]] });
  manifest.add({ slab: 3, parts: [10], holders: [0, 1], runs: [[21, 1]] });
  manifest.addStale({ slab: 3, runs: [[900, 1]] });
  const where = (page: number) => [manifest.whereIs(page)?.slab.slab, manifest.whereIs(page)?.page];
  assert.deepEqual([20, 21, 900, 3].map(where), [
    [1, 4],
    [3, 21],
    [undefined, undefined],
    [1, 5],
  ]);
  assert.deepEqual(manifest.sharersOf(1), [
    [4, [20, 21]],
    [5, [3]],
  ]);
  assert.deepEqual(
    [manifest.pagesOf(1, 5), manifest.pagesOf(1, 4)],
    [
      [5, 3],
      [4, 20, 21],
    ],
  );
  const read = Manifest.fromBytes(manifest.toBytes());
  assert.deepEqual(read.sharersOf(1), manifest.sharersOf(1));
  assert.equal(read.whereIs(20)?.page, 4);
});

test('of a slab that another VM has put there only what is said to be alike is of use', () => {
  const ofPool = { ...division, pool: newId() };
  assert.deepEqual(parseDivision(bodyOf(encodeDivision(ofPool))), ofPool);
  assert.throws(
    () => parseDivision(bodyOf(encodeDivision({ ...division, pool: 'all' }))),
    /a division that is none/,
  );
  const manifest = new Manifest(ofPool, layout);
  const borrowed: Slab = {
    slab: 7,
    parts: [100, 20, 3],
    holders: [0, 2],
    // That VM has more memory, and a page 50 of its own.
    runs: [
      [50, 6],
      [5000, 12],
    ],
    isBorrowed: true,
  };
  assert.deepEqual(parseBorrowed(bodyOf(encodeSlab(borrowed)), ofPool), borrowed);
  const beyond = bodyOf(encodeSlab({ ...borrowed, runs: [[mostPages - 17, 18]] }));
  assert.throws(() => parseBorrowed(beyond, ofPool), /a run of 18 pages/);
  const alike = {
    number: 9,
    pages: [3, 50, 51].map((page, index) => ({ page, slab: 7, like: 5000 + index * 5 })),
  };
  assert.deepEqual(parseAlike(bodyOf(encodeAlike(alike)), 1000), alike);
  manifest.addAlike(alike);
  assert.equal(manifest.covers(3), false, 'the slab may come later');
  manifest.add(borrowed);
  const where = (page: number) => manifest.whereIs(page)?.page;
  assert.deepEqual([3, 50, 51, 52].map(where), [5000, 5005, 5010, undefined]);
  assert.deepEqual([manifest.pagesOf(7, 50), manifest.pagesOf(7, 5005)], [[], [50]]);
  assert.equal(manifest.sealedBytes, 123);
  manifest.addAlike({ number: 10, pages: [{ page: 4, slab: 7, like: 900 }] });
  assert.equal(manifest.covers(4), false, 'a page that is not in that slab');
  const read = Manifest.fromBytes(manifest.toBytes());
  assert.deepEqual([read.division, read.slabs], [ofPool, [borrowed]]);
  assert.deepEqual(read.whereIs(51), { slab: borrowed, page: 5010 });
});

test('a manifest is read from its file as it was, and one that is cut short is none', () => {
  const manifest = new Manifest(division, layout);
  for (let slab = 1; slab < 20; slab++)
    manifest.add({ slab, parts: [1000 + slab], holders: [slab % 3], runs: [[slab * 10, 7]] });
  manifest.addZeroes([
    [300, 10],
    [400, 1],
  ]);
  const bytes = manifest.toBytes();
  const read = Manifest.fromBytes(bytes);
  assert.deepEqual(read.division, division);
  assert.deepEqual(read.slabs, manifest.slabs);
  assert.deepEqual(read.zeroes.runs(), [
    [300, 10],
    [400, 1],
  ]);
  assert.deepEqual(read.layout.table.blocks, table.blocks);
  assert.ok(read.toBytes().equals(bytes));
  let whole = 0;
  for (let end = 0; end < bytes.length; end++)
    try {
      Manifest.fromBytes(bytes.subarray(0, end));
      whole += 1;
    } catch {
      // As it should.
    }
  // It cannot know of frames that are missing as a whole: the file is put in its place in one step.
  assert.equal(whole, 20);
});
