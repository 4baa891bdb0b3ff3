import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { pageBytes } from '../../stream/index.ts';
import { BatchWriter, kinds, type Run, readBatch } from './batch.ts';
import { batchPages } from './frames.ts';
import { PageSet } from './page-set.ts';

const totalPages = 2 ** 20;
const run = fc.record(
  {
    kind: fc.constantFrom(...kinds),
    page: fc.nat(totalPages - 9),
    count: fc.integer({ min: 1, max: 8 }),
    set: fc.nat(3),
    from: fc.nat(totalPages - 9),
  },
  { noNullPrototype: true },
);

/** As the reader gives it: runs that go on from each other are one. */
function written(runs: readonly Run[]): Buffer {
  const writer = new BatchWriter();
  for (const { kind, page, count, set, from } of runs) {
    writer.add(kind, page, count, from, kind === 'set' ? set : 0);
    if (kind === 'literal' || kind === 'delta') writer.data(Buffer.alloc(count * pageBytes, page & 255));
  }
  return writer.finish(Buffer.alloc(writer.bytes));
}

test('a batch says page by page what was put in', () => {
  fc.assert(
    fc.property(fc.array(run, { maxLength: 30 }), (runs) => {
      const pagesOf = (list: readonly Run[]) =>
        list.flatMap(({ kind, page, count, set, from }) =>
          Array.from({ length: count }, (_, index) => ({
            kind,
            page: page + index,
            set: kind === 'set' ? set : 0,
            from: kind === 'set' || kind === 'copy' ? from + index : 0,
          })),
        );
      const bytes = written(runs);
      const read = readBatch(bytes, totalPages);
      assert.deepEqual(pagesOf(read), pagesOf(runs));
      for (const { kind, page, count, dataAt } of read)
        if (kind === 'literal') assert.equal(bytes[dataAt], page & 255, `${count} pages`);
    }),
  );
});

test('a batch that is cut or changed anywhere is refused, or says only what a batch may say', () => {
  fc.assert(
    fc.property(
      fc.array(run, { minLength: 1, maxLength: 10 }),
      fc.nat(),
      fc.nat(255),
      fc.boolean(),
      (runs, place, value, isCut) => {
        const bytes = written(runs);
        const at = place % Math.min(bytes.length, 200);
        const changed = isCut ? bytes.subarray(0, at) : Buffer.from(bytes);
        if (!isCut) changed[at] = value;
        let read: Run[];
        try {
          read = readBatch(changed, totalPages);
        } catch (error) {
          assert.match(String(error), /agent at the other end/);
          return;
        }
        let data = 0;
        for (const { kind, page, count, from } of read) {
          assert.ok(page >= 0 && page + count <= totalPages && from >= 0);
          if (kind !== 'zero') data += count;
        }
        assert.ok(data <= batchPages);
      },
    ),
    { numRuns: 1000 },
  );
});

test('a set of pages is a set of numbers', () => {
  const pages = 100;
  fc.assert(
    fc.property(fc.array(fc.tuple(fc.boolean(), fc.nat(pages - 1)), { maxLength: 200 }), (steps) => {
      const set = new PageSet(pages);
      const model = new Set<number>();
      for (const [isAdded, page] of steps) {
        if (isAdded) assert.equal(set.add(page), !model.has(page));
        else assert.equal(set.delete(page), model.has(page));
        if (isAdded) model.add(page);
        else model.delete(page);
      }
      const members = [...model].sort((a, b) => a - b);
      const listed = (from: PageSet) =>
        from.runs().flatMap(([first, count]) => Array.from({ length: count }, (_, i) => first + i));
      assert.deepEqual(listed(set), members);
      assert.equal(set.size, members.length);
      const copy = PageSet.fromBytes(pages, set.toBytes());
      assert.deepEqual(listed(copy), members);
      assert.equal(copy.size, members.length);
    }),
  );
});

test('bits behind the last page are no pages', () => {
  const set = PageSet.fromBytes(33, Buffer.alloc(8, 0xff));
  assert.equal(set.size, 33);
  assert.equal(set.next(32), 32);
  assert.equal(set.next(33), -1);
});
