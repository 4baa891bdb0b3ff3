import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { mkdtemp, readdir, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, before, test } from 'node:test';
import { newId } from '../../model/ids.ts';
import { KiB, MiB } from '../../model/units.ts';
import { digestBlocks, noBlock } from '../../pages/index.ts';
import { run } from '../../vm/run.ts';
import { indexSharedDisk, openSharedDisk } from './shared-disk.ts';

const signal = AbortSignal.timeout(60_000);
let directory = '';

before(async () => {
  directory = await mkdtemp(path.join(tmpdir(), 'viper-shared-disk-'));
});
after(() => rm(directory, { recursive: true }));

test('what is on a disk that both sides see is found at one and read at the other, and nothing of it stays', async () => {
  const disk = path.join(directory, 'disk.qcow2');
  const content = Buffer.alloc(16 * MiB);
  const own = randomBytes(512 * KiB);
  own.copy(content, 5 * MiB);
  const raw = path.join(directory, 'raw');
  await writeFile(raw, content);
  await run('qemu-img', ['convert', '-f', 'raw', '-O', 'qcow2', raw, disk], { signal });
  const index = await indexSharedDisk(newId(), { disk, directory });
  const reader = await openSharedDisk({ disk, directory });
  assert.ok(index && reader);
  const found = await index.lookup(digestBlocks(own));
  assert.ok(found.every((block) => block !== noBlock));
  assert.equal(index.entries, found.length);
  assert.ok((await reader.read(found)).equals(own));
  await index[Symbol.asyncDispose]();
  await reader[Symbol.asyncDispose]();
  assert.deepEqual((await readdir(directory)).sort(), ['disk.qcow2', 'raw']);
});

test('a disk that is not there, or is none, is no set', async () => {
  const disk = path.join(directory, 'raw');
  assert.equal(await openSharedDisk({ disk, directory }), undefined);
  assert.equal(await indexSharedDisk(newId(), { disk: `${disk}-not`, directory }), undefined);
});
