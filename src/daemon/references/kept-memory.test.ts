import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { mkdtemp, readdir, rm, stat, utimes, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, before, test } from 'node:test';
import pino from 'pino';
import { newId, type Uuid } from '../../model/ids.ts';
import { blockBytes, digestBlocks, digestBytes, noBlock } from '../../pages/index.ts';
import { ImageIndexes } from './image-indexes.ts';
import { KeptMemory } from './kept-memory.ts';
import { ReferenceSets } from './reference-sets.ts';
import { SnapshotIndexes } from './snapshot-indexes.ts';

const { signal } = new AbortController();
const image = `sha256:${'0'.repeat(64)}`;
const quotaBytes = 1024 * 1024;
let work = '';

before(async () => {
  work = await mkdtemp(path.join(tmpdir(), 'viper-kept-'));
});
after(() => rm(work, { recursive: true }));

const newStore = async (quota = quotaBytes) =>
  new KeptMemory({ root: await mkdtemp(path.join(work, 'store-')), quotaBytes: quota });

/** Memory of 20 pages, of which every fifth is zero. */
const newMemory = (): Buffer =>
  Buffer.concat(
    Array.from({ length: 20 }, (_, i) => (i % 5 === 0 ? Buffer.alloc(blockBytes) : randomBytes(blockBytes))),
  );
const numbers = Uint32Array.from({ length: 20 }, (_, i) => i);

async function keep(store: KeptMemory, vmId: Uuid, memory: Buffer): Promise<string> {
  await using keeping = await store.keep(vmId, 20);
  for (const [from, to] of [
    [12, 20],
    [0, 12],
  ] as const)
    await keeping!.write(numbers.slice(from, to), memory.subarray(from * blockBytes, to * blockBytes));
  return await keeping!.finish(signal);
}

async function bytesIn(directory: string): Promise<number> {
  const files = (await readdir(directory, { recursive: true })).map((file) =>
    stat(path.join(directory, file)),
  );
  return (await Promise.all(files)).reduce((sum, { blocks }) => sum + blocks * 512, 0);
}

/** Digests by page as the destination has them: zeroes for pages of zeroes. */
function digestsOf(memory: Buffer): Buffer {
  const digests = digestBlocks(memory);
  for (let page = 0; page < 20; page += 5) digests.fill(0, page * digestBytes, (page + 1) * digestBytes);
  return digests;
}

test('both cloudlets call the memory that stayed behind the same; one finds pages in it, the other reads them', async () => {
  const [left, arrived, vmId, memory] = [await newStore(), await newStore(), newId(), newMemory()];
  const name = await keep(left, vmId, memory);
  assert.equal(await arrived.remember(vmId, digestsOf(memory), signal), name);
  assert.equal(await left.setFor(vmId), name);
  assert.equal(await arrived.setFor(vmId), undefined);
  await using index = await arrived.openIndex(vmId, name);
  const found = await index!.lookup(
    Buffer.concat([digestBlocks(memory.subarray(7 * blockBytes, 8 * blockBytes)), randomBytes(32)]),
  );
  assert.deepEqual([...found], [7, noBlock]);
  await using blocks = await left.openBlocks(vmId, name);
  assert.ok((await blocks!.read(Uint32Array.of(7))).equals(memory.subarray(7 * blockBytes, 8 * blockBytes)));
});

test('a set is found again by the next daemon, replaced by the next stay, and gone when it is forgotten', async () => {
  const root = await mkdtemp(path.join(work, 'store-'));
  const vmId = newId();
  const first = await keep(new KeptMemory({ root, quotaBytes }), vmId, newMemory());
  const store = new KeptMemory({ root, quotaBytes });
  assert.equal(await store.setFor(vmId), first);
  await using blocks = await store.openBlocks(vmId, first);
  assert.equal((await blocks!.read(Uint32Array.of(1))).length, blockBytes);
  const second = await keep(store, vmId, newMemory());
  assert.notEqual(second, first);
  assert.equal(await store.openBlocks(vmId, first), undefined);
  await store.forget(vmId);
  assert.equal(await store.setFor(vmId), undefined);
  assert.equal((await stat(path.join(root, 'key'))).mode & 0o777, 0o600);
});

test('the oldest goes when the quota is reached, and a VM that is larger than the quota is not kept at all', async () => {
  // One memory takes about 72 KiB.
  const store = await newStore(200 * 1024);
  const vms = [newId(), newId(), newId()];
  for (const [age, vmId] of vms.slice(0, 2).entries()) {
    await keep(store, vmId, newMemory());
    const [entry] = (await readdir(work, { recursive: true })).filter((each) =>
      each.endsWith(`${vmId}/pages`),
    );
    await utimes(path.join(work, entry!), 1000 + age, 1000 + age);
  }
  await keep(store, vms[2]!, newMemory());
  const kept = await Promise.all(vms.map((vmId) => store.setFor(vmId)));
  assert.deepEqual(
    kept.map((name) => name !== undefined),
    [false, true, true],
  );
  assert.ok((await store.usedBytes()) <= 200 * 1024);
  const small = await newStore(20 * 1024);
  const vmId = newId();
  await assert.rejects(keep(small, vmId, newMemory()), { code: 'insufficient_space' });
  assert.equal(await small.setFor(vmId), undefined);
  assert.equal(await small.usedBytes(), 0);
});

test('half of what the disk has besides stays free, whatever the quota', async () => {
  const root = await mkdtemp(path.join(work, 'store-'));
  const besides = 320 * 1024;
  const store = new KeptMemory({ root, quotaBytes, freeBytes: async () => besides - (await bytesIn(root)) });
  const vms = [newId(), newId(), newId()];
  for (const vmId of vms) await keep(store, vmId, newMemory());
  assert.notEqual(await store.setFor(vms[2]!), undefined);
  const used = await store.usedBytes();
  assert.ok(used > 0 && used <= besides / 2);
});

test('a cloudlet that is told to keep nothing keeps nothing', async () => {
  assert.equal(await (await newStore(0)).keep(newId(), 20), undefined);
});

test('what a daemon that died was writing is taken away', async () => {
  const store = await newStore();
  const vmId = newId();
  const name = await keep(store, vmId, newMemory());
  const [pages] = (await readdir(work, { recursive: true })).filter((each) => each.endsWith(`${vmId}/pages`));
  const partial = path.join(work, `${pages}.partial`);
  await writeFile(partial, 'half');
  await store.recover();
  await assert.rejects(stat(partial), { code: 'ENOENT' });
  assert.equal(await store.setFor(vmId), name);
});

test("no VM may name another VM's memory, nor an image that is not its own", async () => {
  const kept = await newStore();
  const log = pino({ level: 'silent' });
  const images = new ImageIndexes({ root: path.join(work, 'images'), log });
  const snapshots = new SnapshotIndexes({ directory: (id) => path.join(work, id), log });
  const sets = new ReferenceSets({ images, snapshots, kept, directory: (id) => path.join(work, id) });
  const [mine, other] = [newId(), newId()];
  const memory = newMemory();
  const name = await keep(kept, mine, memory);
  await kept.remember(mine, digestsOf(memory), signal);
  assert.deepEqual(await sets.setsFor({ id: mine, image }), [name]);
  assert.deepEqual(await sets.setsFor({ id: other, image }), []);
  for (const asked of [name, `stayed:${other}:`, `image:sha256:${'1'.repeat(64)}`, 'stayed:../../etc', '']) {
    assert.equal(await sets.openBlocks({ id: other, image }, asked), undefined);
    assert.equal(await sets.openIndex({ id: other, image }, asked), undefined);
  }
  await using blocks = await sets.openBlocks({ id: mine, image }, name);
  await using index = await sets.openIndex({ id: mine, image }, name);
  assert.ok(blocks && index);
});
