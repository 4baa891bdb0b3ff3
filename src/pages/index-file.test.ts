import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, before, test } from 'node:test';
import fc from 'fast-check';
import { AppError } from '../model/errors.ts';
import { blockBytes, digestBytes, digestOf, noBlock } from './blocks.ts';
import { buildIndex, buildIndexFromDigests } from './build-index.ts';
import { openIndex } from './index-file.ts';
import { type IndexOptions, IndexWriter } from './index-writer.ts';
import type { BlockSource } from './reference-set.ts';

let directory = '';
let file = '';
const name = 'image:sha256:00';
const { signal } = new AbortController();

before(async () => {
  directory = await mkdtemp(path.join(tmpdir(), 'viper-index-'));
  file = path.join(directory, 'index');
});
after(() => rm(directory, { recursive: true }));

/** Digests as they come from real content, and such as share 2, 5 or all but the last of their bytes. */
const digest = fc.oneof(
  fc.nat({ max: 5000 }).map((i) => digestOf(Buffer.from(String(i)))),
  fc
    .tuple(fc.constantFrom(2, 5, 31), fc.nat({ max: 9 }))
    .map(([same, last]) => Buffer.alloc(digestBytes, 0xa5).fill(last, same)),
);

function write(digests: readonly Buffer[], changed: Partial<IndexOptions> = {}) {
  using writer = new IndexWriter({ file, name, stamp: 'here', blockCount: digests.length, ...changed });
  for (const [block, each] of digests.entries()) writer.addDigest(block, each);
  return writer.finish();
}

async function answersRightly(
  digests: readonly Buffer[],
  strangers: readonly Buffer[],
  wholeUpToBytes: number,
) {
  await using index = await openIndex(file, { wholeUpToBytes });
  const first = new Map<string, number>();
  digests.forEach((each, block) => {
    const key = each.toString('hex');
    if (!first.has(key)) first.set(key, block);
  });
  assert.equal(index.entries, first.size);
  const asked = [...digests, ...strangers];
  const wanted = asked.map((each) => first.get(each.toString('hex')) ?? noBlock);
  for (let turn = 0; turn < 2; turn += 1)
    assert.deepEqual([...(await index.lookup(Buffer.concat(asked)))], wanted);
}

test('an index finds the first block of each content and nothing else, from memory and from the file', async () => {
  const digests = fc.array(digest, { maxLength: 600 });
  const wholeUpToBytes = fc.constantFrom(0, 1e9);
  // A set of more than 2^18 blocks is sorted in parts.
  const blockCount = fc.constantFrom(600, 2 ** 19, 2 ** 31);
  await fc.assert(
    fc.asyncProperty(digests, digests, wholeUpToBytes, blockCount, async (held, strangers, whole, blocks) => {
      write(held, { blockCount: blocks });
      await answersRightly(held, strangers, whole);
    }),
  );
});

test('records that spill to the disk while an index is built are found again', async () => {
  const digests = Array.from({ length: 9000 }, (_, i) => digestOf(Buffer.from(String(i % 8000))));
  const facts = write(digests, { blockCount: 2 ** 19 });
  assert.equal(facts.records, 8000);
  await answersRightly(digests, [digestOf(Buffer.from('stranger'))], 0);
});

test('an index that was damaged anywhere is refused when it is opened', async () => {
  write(Array.from({ length: 1000 }, (_, i) => digestOf(Buffer.from(String(i)))));
  const whole = await readFile(file);
  const damage = fc.oneof(
    fc.record({ at: fc.nat({ max: whole.length - 1 }), xor: fc.integer({ min: 1, max: 255 }) }),
    fc.record({ length: fc.nat({ max: whole.length - 1 }) }),
    fc.record({ appended: fc.integer({ min: 1, max: 9000 }) }),
  );
  const seed = Number(process.env.SEED ?? Date.now() % 2 ** 31);
  console.log(`fuzz seed ${seed} (repeat with SEED=${seed})`);
  const property = fc.asyncProperty(damage, async (each) => {
    let bytes = Buffer.from(whole);
    if ('at' in each) bytes[each.at]! ^= each.xor;
    else if ('length' in each) bytes = bytes.subarray(0, each.length);
    else bytes = Buffer.concat([bytes, Buffer.alloc(each.appended)]);
    await writeFile(file, bytes);
    await assert.rejects(
      openIndex(file),
      (error) => error instanceof AppError && error.code === 'image_corrupt',
    );
  });
  await fc.assert(property, { seed, numRuns: 400 });
});

test('random files are refused, whatever they claim', async () => {
  const claims = fc.nat({ max: 2 ** 32 - 1 });
  write([]);
  const empty = await readFile(file);
  await fc.assert(
    fc.asyncProperty(claims, fc.uint8Array({ maxLength: 9000 }), async (records, tail) => {
      fc.pre(records > 0);
      const header = Buffer.from(empty.subarray(0, 4096));
      header.writeUInt32LE(records, 16);
      header.writeUInt32LE(2 ** 32 - 1, 20);
      digestOf(header.subarray(0, 4064)).copy(header, 4064);
      await writeFile(file, Buffer.concat([header, tail]));
      await assert.rejects(openIndex(file), { code: 'image_corrupt' });
    }),
  );
});

function sourceOf(blocks: readonly Buffer[], perPiece: number): BlockSource {
  return {
    blockCount: blocks.length,
    async *pieces() {
      for (let first = 0; first < blocks.length; first += perPiece)
        yield { first, bytes: Buffer.concat(blocks.slice(first, first + perPiece)) };
    },
  };
}

test('an index is built from content in another thread; zeroes are left out', async () => {
  const contents = Array.from({ length: 300 }, (_, i) =>
    i % 3 === 0 ? Buffer.alloc(blockBytes) : randomBytes(blockBytes),
  );
  contents[299] = contents[1]!;
  const seen: number[] = [];
  const facts = await buildIndex({
    file,
    name,
    stamp: 'size 1, changed 2',
    source: sourceOf(contents, 7),
    signal,
    onProgress: ({ doneBlocks }) => seen.push(doneBlocks),
  });
  assert.deepEqual(
    { records: facts.records, zeroBlocks: facts.zeroBlocks },
    { records: 199, zeroBlocks: 100 },
  );
  assert.equal(seen.at(-1), 300);
  await using index = await openIndex(file);
  assert.deepEqual([index.name, index.stamp, index.blockCount], [name, 'size 1, changed 2', 300]);
  const found = await index.lookup(Buffer.concat(contents.map((each) => digestOf(each))));
  assert.deepEqual(
    [...found],
    contents.map((_, block) => (block === 299 ? 1 : block % 3 === 0 ? noBlock : block)),
  );
});

test('a build that is cancelled or whose source fails leaves nothing behind', async () => {
  await rm(file, { force: true });
  const blocks = Array.from({ length: 100 }, () => randomBytes(blockBytes));
  const cancel = new AbortController();
  const source = sourceOf(blocks, 1);
  const options = { file, name, stamp: '', source };
  const onProgress = () => cancel.abort();
  await assert.rejects(buildIndex({ ...options, signal: cancel.signal, onProgress }), { code: 'cancelled' });
  const failing: BlockSource = {
    blockCount: 100,
    async *pieces() {
      yield { first: 0, bytes: Buffer.from(blocks[0]!) };
      throw new AppError('image_corrupt', 'the source fails');
    },
  };
  await assert.rejects(buildIndex({ ...options, source: failing, signal }), { code: 'image_corrupt' });
  const missing = path.join(directory, 'missing', 'index');
  await assert.rejects(buildIndex({ ...options, file: missing, signal }), /ENOENT/);
  assert.deepEqual(await readdir(directory), []);
});

test('two cloudlets that know the same digests make the same index and call it the same', async () => {
  const digests = Buffer.alloc(20_000 * digestBytes);
  for (let block = 0; block < 20_000; block += 3)
    digestOf(Buffer.from(String(block % 5000))).copy(digests, block * digestBytes);
  const build = () => buildIndexFromDigests({ file, name: 'stayed:vm:', stamp: '', digests, signal });
  const first = await build();
  const bytes = await readFile(file);
  assert.match(first.name, /^stayed:vm:[0-9a-f]{64}$/);
  assert.equal(first.records, 5000);
  assert.deepEqual(await build(), first);
  assert.deepEqual(await readFile(file), bytes);
  await using index = await openIndex(file);
  const found = await index.lookup(
    Buffer.concat([digests.subarray(0, 32), digestOf(Buffer.from('1')), digests.subarray(32, 64)]),
  );
  // Block 0 is the first with its content; '1' is first at 5001; block 1 is absent.
  assert.deepEqual([...found], [0, 5001, noBlock]);
  digests.fill(1, 32, 64);
  assert.notEqual((await build()).name, first.name);
});
