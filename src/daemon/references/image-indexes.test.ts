import assert from 'node:assert/strict';
import { createHash, randomBytes } from 'node:crypto';
import { mkdir, mkdtemp, readFile, rm, utimes, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, before, test } from 'node:test';
import pino from 'pino';
import { blockBytes, digestBlocks, noBlock } from '../../pages/index.ts';
import { imageFile } from '../../vm/images.ts';
import { ImageIndexes, type Indexed } from './image-indexes.ts';

const log = pino({ level: 'silent' });
let root = '';
const content = Buffer.concat([
  randomBytes(3 * blockBytes),
  Buffer.alloc(blockBytes),
  randomBytes(blockBytes),
]);
const digest = `sha256:${createHash('sha256').update(content).digest('hex')}`;
const image: Indexed = { digest, format: 'raw' };

before(async () => {
  root = await mkdtemp(path.join(tmpdir(), 'viper-indexes-'));
});
after(() => rm(root, { recursive: true }));

async function store(bytes: Buffer): Promise<void> {
  await rm(root, { recursive: true });
  const file = imageFile(root, digest, 'raw');
  await mkdir(path.dirname(file), { recursive: true });
  await writeFile(file, bytes);
}

async function opened(): Promise<AsyncDisposable & { indexes: ImageIndexes }> {
  const indexes = new ImageIndexes({ root, log });
  indexes.add(image);
  await indexes.settled();
  return { indexes, [Symbol.asyncDispose]: () => indexes.close() };
}

async function works(indexes: ImageIndexes): Promise<void> {
  await using index = await indexes.openIndex(digest);
  assert.deepEqual([...(await index!.lookup(digestBlocks(content)))], [0, 1, 2, noBlock, 4]);
  await using blocks = await indexes.openBlocks(digest);
  const bytes = await blocks!.read(Uint32Array.of(4, 0));
  assert.deepEqual(bytes, Buffer.concat([content.subarray(4 * blockBytes), content.subarray(0, blockBytes)]));
}

test('an image gets an index in the background, which the next daemon finds', async () => {
  await store(content);
  const indexFile = path.join(path.dirname(imageFile(root, digest, 'raw')), 'blocks.index');
  {
    await using first = await opened();
    assert.deepEqual(first.indexes.view(digest), { state: 'ready', blocks: 4, fileBytes: 4096 + 4 * 36 });
    await works(first.indexes);
  }
  const made = await readFile(indexFile);
  await using second = await opened();
  await works(second.indexes);
  assert.deepEqual(await readFile(indexFile), made);
});

test('a damaged index is made anew, when it is found at the start and when it is opened', async () => {
  await store(content);
  const indexFile = path.join(path.dirname(imageFile(root, digest, 'raw')), 'blocks.index');
  await writeFile(indexFile, 'no index');
  await using daemon = await opened();
  await works(daemon.indexes);
  const bytes = await readFile(indexFile);
  bytes[4100]! ^= 1;
  await writeFile(indexFile, bytes);
  assert.equal(await daemon.indexes.openIndex(digest), undefined);
  await daemon.indexes.settled();
  await works(daemon.indexes);
});

test('an image whose bytes were changed has no set any more, and one that was only touched has', async () => {
  await store(content);
  await using daemon = await opened();
  const file = imageFile(root, digest, 'raw');
  await utimes(file, 1, 1);
  assert.equal(await daemon.indexes.openIndex(digest), undefined);
  await daemon.indexes.settled();
  await works(daemon.indexes);
  await writeFile(file, Buffer.concat([randomBytes(blockBytes), content.subarray(blockBytes)]));
  assert.equal(await daemon.indexes.openBlocks(digest), undefined);
  await daemon.indexes.settled();
  assert.equal(daemon.indexes.view(digest).state, 'failed');
  assert.equal(await daemon.indexes.openIndex(digest), undefined);
});

test('a removed image has no set, also when its index is being made', async () => {
  await store(content);
  const indexes = new ImageIndexes({ root, log });
  indexes.add(image);
  indexes.remove(digest);
  await rm(root, { recursive: true });
  await indexes.settled();
  assert.equal(await indexes.openIndex(digest), undefined);
  await mkdir(root);
  await indexes.close();
});
