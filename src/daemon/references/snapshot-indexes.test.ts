import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { mkdir, mkdtemp, readFile, rm, truncate, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, before, test } from 'node:test';
import { pino } from 'pino';
import { newId, type Uuid } from '../../model/ids.ts';
import type { SnapshotRecord } from '../../model/vm.ts';
import { digestBlocks, noBlock } from '../../pages/index.ts';
import {
  BlockTable,
  beginSection,
  eof,
  PageWriter,
  pageBytes,
  sectionEnd,
  startSection,
} from '../../stream/index.ts';
import { SnapshotIndexes } from './snapshot-indexes.ts';

const image = `sha256:${'1'.repeat(64)}`;
const table = new BlockTable([{ name: 'pc.ram', sizeBytes: 2000 * pageBytes }]);
let work = '';

before(async () => {
  work = await mkdtemp(path.join(tmpdir(), 'viper-snapshot-indexes-'));
});
after(() => rm(work, { recursive: true }));

/** Memory as QEMU captures it: pages in any order, zero pages among them. */
function capture(pages: ReadonlyMap<number, Buffer>): Buffer {
  const writer = new PageWriter(table);
  const records = [...pages].map(([page, content]) => {
    const to = Buffer.alloc(PageWriter.maxBytes);
    const isZero = content.every((byte) => byte === 0);
    return to.subarray(0, isZero ? writer.zeroPage(to, 0, page) : writer.page(to, 0, page, content, 0));
  });
  return Buffer.concat([
    Buffer.from('5145564d00000003', 'hex'),
    startSection(2, table),
    beginSection('part', 2),
    ...records,
    sectionEnd(2),
    eof(),
    Buffer.from('devices'),
  ]);
}

const snapshotOn = (id: Uuid, of = image) => ({ id, spec: { disk: { image: of } } }) as SnapshotRecord;

function open(): SnapshotIndexes {
  return new SnapshotIndexes({ directory: (id) => path.join(work, id), log: pino({ level: 'silent' }) });
}

async function settled(indexes: SnapshotIndexes, id: Uuid): Promise<string> {
  for (;;) {
    const { state } = indexes.view(id);
    if (state === 'ready' || state === 'failed') return state;
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
}

async function captured(pages: ReadonlyMap<number, Buffer>): Promise<Uuid> {
  const id = newId();
  await mkdir(path.join(work, id));
  await writeFile(path.join(work, id, 'memory'), capture(pages));
  return id;
}

/** 700 pages with content, so that they fill more than one piece, and two of zeroes. */
function anyPages(): Map<number, Buffer> {
  const order = Array.from({ length: 702 }, (_, index) => (index * 613) % 2000);
  return new Map(
    order.map((page, index) => [page, index < 2 ? Buffer.alloc(pageBytes) : randomBytes(pageBytes)]),
  );
}

test('what a golden snapshot has in memory is found by content and read by number, by VMs on its image', async () => {
  const pages = anyPages();
  const [north, south] = [open(), open()];
  const [here, there] = [await captured(pages), await captured(pages)];
  north.add(snapshotOn(here));
  south.add(snapshotOn(there));
  assert.equal(await settled(north, here), 'ready');
  assert.equal(await settled(south, there), 'ready');
  // Both call it the same, and so an index of one is good for the blocks of the other.
  const [name] = south.setsFor(image);
  assert.deepEqual(north.setsFor(image), [name]);
  await using index = await north.openIndex(image, name!);
  await using blocks = await south.openBlocks(image, name!);
  const wanted = [...pages.values()].slice(2);
  const found = await index!.lookup(digestBlocks(Buffer.concat(wanted)));
  assert.ok(found.every((block) => block !== noBlock));
  assert.ok((await blocks!.read(found)).equals(Buffer.concat(wanted)));
  const some = Uint32Array.of(found[5]!, found[699]!, found[0]!, found[1]!);
  assert.ok(
    (await blocks!.read(some)).equals(Buffer.concat([wanted[5]!, wanted[699]!, wanted[0]!, wanted[1]!])),
  );
  await assert.rejects(blocks!.read(Uint32Array.of(700)), { code: 'invalid_request' });
  // A VM on another image has no part in it.
  const other = `sha256:${'2'.repeat(64)}`;
  assert.deepEqual(north.setsFor(other), []);
  assert.equal(await north.openIndex(other, name!), undefined);
  assert.equal(await south.openBlocks(other, name!), undefined);
  await Promise.all([north.close(), south.close()]);
});

test('a capture that was changed behind our back is no set until it is indexed anew; a damaged one is none', async () => {
  const id = await captured(anyPages());
  const memory = path.join(work, id, 'memory');
  const first = open();
  first.add(snapshotOn(id));
  await settled(first, id);
  const [name] = first.setsFor(image);
  await writeFile(memory, capture(anyPages()));
  assert.equal(await first.openBlocks(image, name!), undefined);
  assert.equal(await settled(first, id), 'ready');
  const [renewed] = first.setsFor(image);
  assert.notEqual(renewed, name);
  await truncate(path.join(work, id, 'memory.pages'), 100);
  assert.equal(await first.openBlocks(image, renewed!), undefined);
  assert.equal(await settled(first, id), 'ready');
  assert.ok(
    await first
      .openBlocks(image, renewed!)
      .then((reader) => reader?.[Symbol.asyncDispose]().then(() => true)),
  );
  await first.close();
  // As it is, a daemon that starts again finds the index there and makes none.
  const made = await readFile(path.join(work, id, 'memory.index'));
  const again = open();
  again.add(snapshotOn(id));
  assert.equal(await settled(again, id), 'ready');
  assert.deepEqual(again.setsFor(image), [renewed]);
  assert.ok((await readFile(path.join(work, id, 'memory.index'))).equals(made));
  await again.close();
  await writeFile(memory, randomBytes(10_000));
  const bad = open();
  bad.add(snapshotOn(id));
  assert.equal(await settled(bad, id), 'failed');
  assert.deepEqual(bad.setsFor(image), []);
  await bad.close();
});
