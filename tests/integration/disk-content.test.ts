/** Our reader of disks against what the real qemu-img makes of the same files. */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { mkdtemp, open, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, before, test } from 'node:test';
import fc from 'fast-check';
import { type DiskContent, openDiskContent } from '../../src/vm/disk-content.ts';
import type { ImageFormat } from '../../src/vm/image-check.ts';

const diskBytes = 9 * 1024 * 1024 + 512;
const { signal } = new AbortController();
let directory = '';
const at = (name: string) => path.join(directory, name);
const qemuImg = (...args: string[]) => execFileSync('qemu-img', args);
const qemuIo = (file: string, ...commands: string[]) =>
  execFileSync('qemu-io', ['-f', 'qcow2', ...commands.flatMap((each) => ['-c', each]), file]);

before(async () => {
  directory = await mkdtemp(path.join(tmpdir(), 'viper-content-'));
  const disk = Buffer.alloc(diskBytes);
  // Text that packs well, numbers that do not, and holes.
  disk.fill('a line of text that comes again and again\n', 70_000, 900_000);
  for (let i = 2_000_000; i < 3_500_000; i += 4) disk.writeUInt32LE(Math.imul(i, 2654435761) >>> 0, i);
  disk.fill(7, diskBytes - 512);
  await writeFile(at('base.raw'), disk);
});
after(() => rm(directory, { recursive: true }));

async function readAll(content: DiskContent): Promise<Buffer> {
  const all = Buffer.alloc(content.virtualBytes);
  await content.read(0, all);
  return all;
}

/** Reads the disk whole, in pieces at random places, and by its ranges of data; each must be what QEMU reads. */
async function agreesWithQemu(name: string, format: ImageFormat): Promise<void> {
  qemuImg('convert', '-f', format, '-O', 'raw', at(name), at('wanted.raw'));
  const wanted = await readFile(at('wanted.raw'));
  await using content = await openDiskContent(at(name), format);
  assert.equal(content.virtualBytes, wanted.length);
  assert.ok((await readAll(content)).equals(wanted), 'read as a whole');
  const place = fc.record({ offset: fc.nat({ max: wanted.length - 1 }), bytes: fc.nat({ max: 300_000 }) });
  await fc.assert(
    fc.asyncProperty(place, async ({ offset, bytes }) => {
      const piece = Buffer.alloc(Math.min(bytes, wanted.length - offset));
      await content.read(offset, piece);
      assert.ok(piece.equals(wanted.subarray(offset, offset + piece.length)), `${piece.length} at ${offset}`);
    }),
    { numRuns: 50 },
  );
  const byRanges = Buffer.alloc(wanted.length);
  let last = -1;
  for await (const { offset, lengthBytes } of content.dataRanges(signal)) {
    assert.ok(offset > last && lengthBytes > 0, 'ranges ascend and do not touch');
    await content.read(offset, byRanges.subarray(offset, offset + lengthBytes));
    last = offset + lengthBytes;
  }
  assert.ok(byRanges.equals(wanted), 'what lies outside of the ranges is zero');
}

test('a raw disk reads as QEMU reads it', () => agreesWithQemu('base.raw', 'raw'));

const kinds: [string, string[]][] = [
  ['plain', []],
  ['of version 2', ['-o', 'compat=0.10']],
  ['compressed by zlib', ['-c']],
  ['compressed by zstd', ['-c', '-o', 'compression_type=zstd']],
  ['of small clusters', ['-o', 'cluster_size=512']],
  ['of large clusters', ['-o', 'cluster_size=2M']],
  ['of subclusters', ['-o', 'extended_l2=on,cluster_size=128k']],
];
for (const [kind, options] of kinds) {
  test(`a qcow2 disk ${kind} reads as QEMU reads it, and so does an overlay on it`, async () => {
    qemuImg('convert', '-f', 'raw', '-O', 'qcow2', ...options, at('base.raw'), at('base.qcow2'));
    await agreesWithQemu('base.qcow2', 'qcow2');
    const over = ['-F', 'qcow2', '-b', 'base.qcow2'];
    const extended = kind === 'of subclusters' ? ['-o', 'extended_l2=on,cluster_size=128k'] : [];
    qemuImg(
      'create',
      '-q',
      '-f',
      'qcow2',
      ...over,
      ...extended,
      at('over.qcow2'),
      String(diskBytes + 3_000_320),
    );
    qemuIo(
      at('over.qcow2'),
      'write -P 3 100k 5k',
      'write -P 4 8M 2500000',
      'write -z 500k 256k',
      'discard 2M 1M',
      'write -P 9 2200k 4k',
    );
    await agreesWithQemu('over.qcow2', 'qcow2');
  });
}

test('a compressed cluster that does not unpack is refused and never read as something else', async () => {
  for (const compression of ['zlib', 'zstd']) {
    const options = ['-c', '-o', `compression_type=${compression}`];
    qemuImg('convert', '-f', 'raw', '-O', 'qcow2', ...options, at('base.raw'), at('bad.qcow2'));
    await using file = await open(at('bad.qcow2'), 'r+');
    const { size } = await file.stat();
    const whole = await readFile(at('bad.qcow2'));
    // The clusters stand behind the tables; 0xff bytes begin neither a deflate stream nor a zstd frame.
    await file.write(Buffer.alloc(size - 5 * 65_536, 0xff), 0, size - 5 * 65_536, 5 * 65_536);
    assert.notDeepEqual(await readFile(at('bad.qcow2')), whole);
    await using content = await openDiskContent(at('bad.qcow2'), 'qcow2');
    await assert.rejects(readAll(content), { code: 'image_corrupt' });
  }
});

test('a disk that is not of the stated format, and a chain without end, are refused', async () => {
  await assert.rejects(openDiskContent(at('base.raw'), 'qcow2'), { code: 'image_corrupt' });
  const files = Array.from({ length: 10 }, (_, i) => at(`chain-${i}.qcow2`));
  qemuImg('create', '-q', '-f', 'qcow2', files[0]!, '1M');
  for (let i = 1; i < files.length; i += 1)
    qemuImg('create', '-q', '-f', 'qcow2', '-F', 'qcow2', '-b', files[i - 1]!, files[i]!);
  await assert.rejects(openDiskContent(files[9]!, 'qcow2'), {
    code: 'image_corrupt',
    message: /more than 8/,
  });
  await using content = await openDiskContent(files[7]!, 'qcow2');
  await assert.rejects(content.read(1024 * 1024 - 1, Buffer.alloc(2)), { code: 'image_corrupt' });
});
