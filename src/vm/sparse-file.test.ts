import assert from 'node:assert/strict';
import { mkdtemp, open, readFile, rm, stat } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import fc from 'fast-check';
import { SparseWriter } from './sparse-file.ts';

async function written(chunks: readonly Uint8Array[]) {
  const directory = await mkdtemp(join(tmpdir(), 'viper-sparse-'));
  try {
    const file = join(directory, 'file');
    await using handle = await open(file, 'wx');
    const writer = new SparseWriter(handle);
    for (const chunk of chunks) await writer.write(chunk);
    await writer.finish();
    const { blocks } = await stat(file);
    return { bytes: await readFile(file), allocatedBytes: blocks * 512, writtenBytes: writer.writtenBytes };
  } finally {
    await rm(directory, { recursive: true });
  }
}

test('runs of zeros take no room, at the end of the file as well', async () => {
  const data = Buffer.alloc(4 * 1024 * 1024);
  data.fill(7, 1_000_000, 1_010_000);
  const { bytes, allocatedBytes, writtenBytes } = await written([data.subarray(0, 777), data.subarray(777)]);
  assert.ok(bytes.equals(data));
  assert.ok(writtenBytes < 20_000, `${writtenBytes} bytes written`);
  assert.ok(allocatedBytes < 100_000, `${allocatedBytes} bytes allocated`);
});

test('the file reads as the stream, however it is cut into chunks', async () => {
  const piece = fc.record({ length: fc.nat(9000), value: fc.constantFrom(0, 0, 1, 255) });
  await fc.assert(
    fc.asyncProperty(
      fc.array(piece, { maxLength: 12 }),
      fc.integer({ min: 1, max: 9000 }),
      async (pieces, cut) => {
        const all = Buffer.concat(pieces.map(({ length, value }) => Buffer.alloc(length, value)));
        const chunks: Uint8Array[] = [];
        for (let at = 0; at < all.length; at += cut) chunks.push(all.subarray(at, at + cut));
        assert.ok((await written(chunks)).bytes.equals(all));
      },
    ),
    { numRuns: 60 },
  );
});
