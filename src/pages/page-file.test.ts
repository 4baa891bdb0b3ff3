import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, before, test } from 'node:test';
import fc from 'fast-check';
import { blockBytes } from './blocks.ts';
import { openPageFile, PageFileWriter } from './page-file.ts';

const wrapping = randomBytes(32);
let directory = '';
let file = '';

before(async () => {
  directory = await mkdtemp(path.join(tmpdir(), 'viper-page-file-'));
  file = path.join(directory, 'pages');
});
after(() => rm(directory, { recursive: true }));

const contentOf = (pages: readonly number[]): Buffer =>
  Buffer.concat(pages.map((page) => Buffer.alloc(blockBytes, `page ${page} `)));

async function write(batches: readonly (readonly number[])[], pageCount = 100): Promise<void> {
  await using writer = await PageFileWriter.create({ file, pageCount, wrapping });
  for (const pages of batches) await writer.write(Uint32Array.from(pages), contentOf(pages));
  await writer.finish();
}

test('pages come back by number, in whatever order they were written and are read', async () => {
  const pages = fc.uniqueArray(fc.nat({ max: 99 }), { minLength: 1, maxLength: 60 });
  await fc.assert(
    fc.asyncProperty(pages, fc.nat({ max: 60 }), fc.array(fc.nat({ max: 59 })), async (all, cut, picks) => {
      await write([all.slice(0, cut), all.slice(cut)]);
      await using reader = await openPageFile(file, wrapping);
      const asked = picks.map((pick) => all[pick % all.length]!);
      assert.ok((await reader.read(Uint32Array.from(asked))).equals(contentOf(asked)));
    }),
    { numRuns: 30 },
  );
});

test('nothing of a page stands in the file as it is', async () => {
  await write([[3, 4, 50]]);
  const bytes = await readFile(file);
  assert.equal(bytes.indexOf('page 3'), -1);
  assert.notDeepEqual(
    bytes.subarray(4096 + 3 * 4112, 4096 + 4 * 4112),
    bytes.subarray(4096 + 4 * 4112, 4096 + 5 * 4112),
  );
});

test('a page that was not written, lies outside or was changed is refused, and so is another key', async () => {
  await write([[3, 4]]);
  const whole = await readFile(file);
  const read = async (...pages: number[]) => {
    await using reader = await openPageFile(file, wrapping);
    return await reader.read(Uint32Array.from(pages));
  };
  const corrupt = { code: 'image_corrupt' };
  await assert.rejects(read(2), corrupt);
  await assert.rejects(read(5), corrupt);
  await assert.rejects(read(100), { code: 'invalid_request' });
  await assert.rejects(openPageFile(file, randomBytes(32)), corrupt);
  const anywhere = fc.nat({ max: whole.length - 1 });
  await fc.assert(
    fc.asyncProperty(anywhere, fc.integer({ min: 1, max: 255 }), async (at, xor) => {
      const bytes = Buffer.from(whole);
      bytes[at]! ^= xor;
      await writeFile(file, bytes);
      // A hole that is no hole any more does not matter as long as nobody asks for it.
      const isInHole = at >= 4096 && at < 4096 + 3 * 4112;
      if (isInHole) assert.ok((await read(3, 4)).equals(contentOf([3, 4])));
      else await assert.rejects(read(3, 4), corrupt);
    }),
  );
  const length = fc.nat({ max: whole.length - 1 });
  await fc.assert(
    fc.asyncProperty(length, async (bytes) => {
      await writeFile(file, whole.subarray(0, bytes));
      await assert.rejects(read(3, 4), corrupt);
    }),
    { numRuns: 30 },
  );
});

test('a page that comes twice is refused, for its nonce would too; what is not finished leaves nothing', async () => {
  await rm(file, { force: true });
  await assert.rejects(write([[1, 2], [2]]), { code: 'invalid_request' });
  await assert.rejects(write([[1, 100]]), { code: 'invalid_request' });
  assert.deepEqual(await readdir(directory), []);
});
