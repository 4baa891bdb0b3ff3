import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { test } from 'node:test';
import { boundedReader, digestBlocks, digestBytes, MemoryIndex } from '../../pages/index.ts';
import { pageBytes } from '../../stream/index.ts';
import { Condenser } from './condenser.ts';
import { batchPages, frame } from './frames.ts';
import { PageBatch } from './page-batch.ts';
import { Rebuilder, unpack } from './rebuilder.ts';
import { noStatistics } from './statistics.ts';

const known = randomBytes(batchPages * pageBytes);
const pages = 64 * batchPages;

/** A condenser with a set of `known`, and the destination's half that makes pages of what it gives. */
function pair(linkSpeed: number) {
  const index = new MemoryIndex({ maxEntries: batchPages });
  const digests = digestBlocks(known);
  for (let block = 0; block < batchPages; block += 1) index.set(block, digests, block * digestBytes);
  const statistics = noStatistics();
  const condenser = new Condenser({
    pages,
    sets: [index],
    destinationReads: true,
    linkSpeed: () => linkSpeed,
    statistics,
  });
  const reader = boundedReader(
    {
      blockCount: batchPages,
      read: async (blocks) =>
        Buffer.concat([...blocks].map((block) => known.subarray(block * pageBytes, (block + 1) * pageBytes))),
      async [Symbol.asyncDispose]() {},
    },
    10_000,
  );
  const ram = Buffer.alloc(pages * pageBytes);
  const memory = {
    read: (page: number, count: number, to: Buffer, at = 0) =>
      void ram.copy(to, at, page * pageBytes, (page + count) * pageBytes),
  };
  const rebuilder = new Rebuilder({ pages, sets: [reader], memory });
  const move = async (first: number, content: Buffer): Promise<void> => {
    const batch = new PageBatch();
    for (let page = 0; page < batchPages; page += 1) batch.addPage(first + page, content, page * pageBytes);
    const [head, ...body] = await condenser.condense(batch, { onTaken: () => {} });
    assert.equal(head![0], frame.batch);
    const { runs, missed } = await rebuilder.rebuild(await unpack(Buffer.concat(body)));
    assert.deepEqual(missed, []);
    for (const { page, content } of runs) content!.copy(ram, page * pageBytes);
    assert.ok(ram.subarray(first * pageBytes, (first + batchPages) * pageBytes).equals(content));
  };
  return { statistics, move };
}

test('on a slow link every page is looked for', async () => {
  const { statistics, move } = pair(10e6);
  for (let turn = 0; turn < 12; turn += 1) await move(turn * batchPages, randomBytes(known.length));
  await move(20 * batchPages, known);
  assert.equal(statistics.pages.set, batchPages);
});

test('on a fast link nothing is looked for where nothing was found, until there is something again', async () => {
  const { statistics, move } = pair(600e6);
  // Not at once: the first bytes go into buffers, however slow the link is.
  const sentBefore = 65;
  for (let turn = 0; turn < sentBefore + 12; turn += 1)
    await move((turn % 20) * batchPages, randomBytes(known.length));
  // A page that goes again as it was is one that was not looked for.
  const before = statistics.pages.literal;
  const again = randomBytes(known.length);
  await move(20 * batchPages, again);
  await move(20 * batchPages, again);
  assert.ok(statistics.pages.literal >= before + batchPages);
  for (let turn = 0; turn < 24; turn += 1) await move((21 + turn) * batchPages, known);
  assert.ok(statistics.pages.set >= 12 * batchPages, `${statistics.pages.set} pages of the set`);
});
