import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { AppError } from '../model/errors.ts';
import { requireRawDisk } from './raw.ts';

const MiB = 1024 * 1024;
const blank = () => Buffer.alloc(128 * 1024);
const accept = (head: Uint8Array, fileBytes: number, stated = false) =>
  requireRawDisk(head, fileBytes, stated);
const refuse = (head: Uint8Array, fileBytes: number, message: RegExp, stated = false) =>
  assert.throws(() => accept(head, fileBytes, stated), { code: 'image_corrupt', message });

function withMbr(firstSector: number, sectors: number): Buffer {
  const head = blank();
  head[446 + 4] = 0x83;
  head.writeUInt32LE(firstSector, 446 + 8);
  head.writeUInt32LE(sectors, 446 + 12);
  head.writeUInt16LE(0xaa55, 510);
  return head;
}

function withGpt(sectorBytes: number, lastSector: bigint): Buffer {
  const head = withMbr(1, 0xffffffff);
  head[446 + 4] = 0xee;
  head.write('EFI PART', sectorBytes);
  head.writeBigUInt64LE(lastSector, sectorBytes + 32);
  return head;
}

function withExt4(blocks: number): Buffer {
  const head = blank();
  head.writeUInt32LE(blocks, 1024 + 4);
  head.writeUInt32LE(2, 1024 + 24);
  head.writeUInt16LE(0xef53, 1024 + 56);
  return head;
}

test('a disk with partitions or a known file system is taken', () => {
  accept(withMbr(2048, 4096), 4 * MiB);
  accept(withGpt(512, 8191n), 4 * MiB);
  accept(withGpt(4096, 1023n), 4 * MiB);
  accept(withExt4(1024), 4 * MiB);
  const xfs = blank();
  xfs.write('XFSB');
  accept(xfs, 4 * MiB);
  const bootSectorOnly = blank();
  bootSectorOnly.fill('boot code', 0, 510);
  bootSectorOnly.writeUInt16LE(0xaa55, 510);
  accept(bootSectorOnly, MiB);
});

test('a disk that is shorter than its own tables say was cut off', () => {
  refuse(withMbr(2048, 8192), 4 * MiB, /it has 4194304 bytes, wanted the 5242880 bytes/);
  refuse(withGpt(512, 8192n), 4 * MiB, /wanted the 4194816 bytes/);
  refuse(withGpt(4096, 1024n), 4 * MiB, /wanted the 4198400 bytes/);
  refuse(withExt4(1025), 4 * MiB, /wanted the 4198400 bytes/);
  refuse(withGpt(512, (1n << 64n) - 1n), 4 * MiB, /wanted the/, true);
});

test('text, blank and random files are no disks, unless the caller vouches for them', () => {
  const text = Buffer.from('hello world\n'.repeat(1024)).subarray(0, 8192);
  refuse(
    text,
    8192,
    /no partition table and no known file system, wanted one, or the format stated as 'raw'/,
  );
  refuse(blank(), MiB, /no partition table/);
  accept(text, 8192, true);
  accept(blank(), MiB, true);
});

test('the length is a multiple of 512 above 0, whoever vouches', () => {
  refuse(Buffer.alloc(0), 0, /it has 0 bytes/, true);
  refuse(withMbr(1, 1), 2049, /it has 2049 bytes, wanted a multiple of 512/, true);
});

test('archives and disks of other hypervisors are refused by name', () => {
  for (const [bytes, name] of [
    ['\x1f\x8b', /gzip/],
    ['\xfd7zXZ\0', /xz/],
    ['\x28\xb5\x2f\xfd', /zstd/],
    ['KDMV', /VMDK/],
    ['vhdxfile', /VHDX/],
    ['conectix', /VHD/],
  ] as const) {
    const head = blank();
    head.write(bytes, 'latin1');
    refuse(head, MiB, name, true);
  }
});

test('any bytes are either taken or refused as corrupt', () => {
  fc.assert(
    fc.property(fc.uint8Array({ maxLength: 4096 }), fc.nat(8 * MiB), fc.boolean(), (head, size, stated) => {
      try {
        accept(head, size, stated);
      } catch (error) {
        assert.ok(error instanceof AppError && error.code === 'image_corrupt', String(error));
      }
    }),
    { numRuns: 500 },
  );
});
