import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { blockBytes } from './blocks.ts';
import { type Content, contentReader, contentSource } from './content-blocks.ts';
import { maxPieceBlocks } from './reference-set.ts';

const { signal } = new AbortController();

/** Content whose every block begins with its own number. */
function content(virtualBytes: number, ranges: { offset: number; lengthBytes: number }[] = []): Content {
  return {
    virtualBytes,
    async read(offset, into) {
      assert.ok(offset + into.length <= virtualBytes, 'reads stay inside');
      for (let at = 0; at < into.length; at += blockBytes) into.writeUInt32LE((offset + at) / blockBytes, at);
    },
    async *dataRanges() {
      yield* ranges;
    },
    async [Symbol.asyncDispose]() {},
  };
}

test('blocks are read in the order asked for, whatever it is', async () => {
  const blocks = fc.array(fc.nat({ max: 999 }), { maxLength: 600 });
  await fc.assert(
    fc.asyncProperty(blocks, fc.boolean(), async (unsorted, sorted) => {
      const asked = sorted ? unsorted.toSorted((a, b) => a - b) : unsorted;
      await using reader = contentReader(content(1000 * blockBytes + 512));
      const bytes = await reader.read(Uint32Array.from(asked));
      assert.deepEqual(
        asked.map((_, i) => bytes.readUInt32LE(i * blockBytes)),
        asked,
      );
    }),
  );
});

test('blocks that lie close together are read at once, and one reader gives one after the other', async () => {
  const reads: number[] = [];
  const disk = content(1000 * blockBytes);
  await using reader = contentReader({
    ...disk,
    async read(offset, into) {
      reads.push(offset / blockBytes);
      await disk.read(offset, into);
    },
  });
  for (const asked of [
    [7, 5, 500, 6, 9],
    [501, 12, 501],
  ]) {
    const bytes = await reader.read(Uint32Array.from(asked));
    assert.deepEqual(
      asked.map((_, i) => bytes.readUInt32LE(i * blockBytes)),
      asked,
    );
  }
  assert.deepEqual(reads, [5, 500, 12, 501]);
});

test('what a read that failed has left behind is not in the next one', async () => {
  const late = Promise.withResolvers<void>();
  let isBad = true;
  const disk = content(1000 * blockBytes);
  await using reader = contentReader({
    ...disk,
    async read(offset, into) {
      if (isBad && offset === 0) throw new Error('the first block is bad');
      if (isBad) {
        await late.promise;
        into.fill(0xee);
        return;
      }
      await disk.read(offset, into);
    },
  });
  await assert.rejects(reader.read(Uint32Array.of(0, 900)), /the first block is bad/);
  isBad = false;
  const bytes = await reader.read(Uint32Array.of(1, 900));
  late.resolve();
  await new Promise(setImmediate);
  assert.deepEqual([bytes.readUInt32LE(0), bytes.readUInt32LE(blockBytes)], [1, 900]);
});

test('a block that the set does not have is refused by its number', async () => {
  await using reader = contentReader(content(1000 * blockBytes + 512));
  assert.equal(reader.blockCount, 1000);
  for (const block of [1000, 2 ** 32 - 1])
    await assert.rejects(reader.read(Uint32Array.of(1, block)), {
      code: 'invalid_request',
      message: new RegExp(`${block}`),
    });
});

test('pieces cover every block that a range of data touches, each once and ascending', async () => {
  const range = fc.record({
    gap: fc.integer({ min: 1, max: 3e6 }),
    lengthBytes: fc.integer({ min: 1, max: 3e6 }),
  });
  await fc.assert(
    fc.asyncProperty(fc.array(range, { maxLength: 6 }), async (steps) => {
      let end = 0;
      const ranges = steps.map(({ gap, lengthBytes }) => {
        const offset = end + gap;
        end = offset + lengthBytes;
        return { offset, lengthBytes };
      });
      const blockCount = Math.floor(end / blockBytes);
      const wanted = new Set<number>();
      for (const { offset, lengthBytes } of ranges)
        for (
          let block = Math.floor(offset / blockBytes);
          block * blockBytes < offset + lengthBytes;
          block += 1
        )
          if (block < blockCount) wanted.add(block);
      const seen: number[] = [];
      for await (const { first, bytes } of contentSource(content(end, ranges)).pieces(signal)) {
        assert.ok(bytes.length <= maxPieceBlocks * blockBytes);
        for (let i = 0; i < bytes.length / blockBytes; i += 1) {
          assert.equal(bytes.readUInt32LE(i * blockBytes), first + i);
          seen.push(first + i);
        }
      }
      assert.deepEqual(seen, [...wanted]);
    }),
    { numRuns: 50 },
  );
});
