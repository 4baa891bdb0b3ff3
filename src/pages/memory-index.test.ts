import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { digestBytes, digestOf, noBlock } from './blocks.ts';
import { MemoryIndex } from './memory-index.ts';

const contents = Array.from({ length: 12 }, (_, i) => digestOf(Buffer.from([i])));
const step = fc.oneof(
  fc.record({ block: fc.nat({ max: 20 }), content: fc.nat({ max: contents.length - 1 }) }),
  fc.record({ block: fc.nat({ max: 20 }) }),
);

test('an index in memory never names a block whose content has changed, and knows the first of each content', async () => {
  await fc.assert(
    fc.asyncProperty(
      fc.array(step, { maxLength: 200 }),
      fc.integer({ min: 1, max: 30 }),
      async (steps, max) => {
        await using index = new MemoryIndex({ maxEntries: max });
        const held = new Map<number, number>();
        for (const each of steps) {
          held.delete(each.block);
          if (!('content' in each)) index.delete(each.block);
          else {
            const isKnown = [...held.values()].includes(each.content);
            const taken = index.set(each.block, contents[each.content]!);
            assert.equal(taken, !isKnown && held.size < max);
            if (taken) held.set(each.block, each.content);
          }
        }
        const found = await index.lookup(Buffer.concat(contents));
        const wanted = contents.map(
          (_, content) => [...held].find((each) => each[1] === content)?.[0] ?? noBlock,
        );
        assert.deepEqual([...found], wanted);
        assert.equal(index.entries, held.size);
      },
    ),
  );
});

test('digests that share their first bytes are told apart', async () => {
  await using index = new MemoryIndex({ maxEntries: 4 });
  const digests = [0, 1, 2].map((last) => Buffer.alloc(digestBytes).fill(last, digestBytes - 1));
  index.set(7, digests[0]!);
  index.set(8, digests[1]!);
  assert.deepEqual([...(await index.lookup(Buffer.concat(digests)))], [7, 8, noBlock]);
});
