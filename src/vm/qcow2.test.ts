import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { AppError } from '../model/errors.ts';
import { isQcow2, maxVirtualBytes, parseQcow2Header, requireSelfContained } from './qcow2.ts';

const clusterBytes = 65536;
const fileBytes = 8 * clusterBytes;

interface Fields {
  version: number;
  clusterBits: number;
  virtualBytes: bigint;
  encryption: number;
  l1Entries: number;
  l1Offset: bigint;
  refcountOffset: bigint;
  refcountClusters: number;
  snapshots: number;
  snapshotsOffset: bigint;
  features: bigint;
  refcountOrder: number;
  headerBytes: number;
  compression: number;
  backing: string;
  extensions: { type: number; data: string }[];
}

/** The first cluster of a sound image of 8 MiB, with the given fields changed. */
function image(changed: Partial<Fields> = {}): Uint8Array {
  const fields: Fields = {
    version: 3,
    clusterBits: 16,
    virtualBytes: 8n * 1024n * 1024n,
    encryption: 0,
    l1Entries: 1,
    l1Offset: 3n * 65536n,
    refcountOffset: 65536n,
    refcountClusters: 1,
    snapshots: 0,
    snapshotsOffset: 0n,
    features: 0n,
    refcountOrder: 4,
    headerBytes: 112,
    compression: 0,
    backing: '',
    extensions: [],
    ...changed,
  };
  const bytes = Buffer.alloc(clusterBytes);
  bytes.writeUInt32BE(0x514649fb, 0);
  bytes.writeUInt32BE(fields.version, 4);
  bytes.writeUInt32BE(fields.clusterBits, 20);
  bytes.writeBigUInt64BE(fields.virtualBytes, 24);
  bytes.writeUInt32BE(fields.encryption, 32);
  bytes.writeUInt32BE(fields.l1Entries, 36);
  bytes.writeBigUInt64BE(fields.l1Offset, 40);
  bytes.writeBigUInt64BE(fields.refcountOffset, 48);
  bytes.writeUInt32BE(fields.refcountClusters, 56);
  bytes.writeUInt32BE(fields.snapshots, 60);
  bytes.writeBigUInt64BE(fields.snapshotsOffset, 64);
  if (fields.version === 3) {
    bytes.writeBigUInt64BE(fields.features, 72);
    bytes.writeUInt32BE(fields.refcountOrder, 96);
    bytes.writeUInt32BE(fields.headerBytes, 100);
    bytes.writeUInt8(fields.compression, 104);
  }
  let at = fields.version === 3 ? fields.headerBytes : 72;
  for (const { type, data } of fields.extensions) {
    bytes.writeUInt32BE(type, at);
    bytes.writeUInt32BE(data.length, at + 4);
    bytes.write(data, at + 8, 'latin1');
    at += 8 + Math.ceil(data.length / 8) * 8;
  }
  if (fields.backing) {
    bytes.writeBigUInt64BE(4096n, 8);
    bytes.writeUInt32BE(fields.backing.length, 16);
    bytes.write(fields.backing, 4096, 'latin1');
  }
  return bytes;
}

const accept = (changed: Partial<Fields> = {}) => {
  const header = parseQcow2Header(image(changed));
  requireSelfContained(header, fileBytes);
  return header;
};
const refuse = (changed: Partial<Fields>, message: RegExp) =>
  assert.throws(() => accept(changed), { code: 'image_corrupt', message });

test('a sound header gives its facts, in version 3 and in version 2', () => {
  for (const version of [2, 3] as const) {
    const header = accept({ version });
    assert.equal(header.version, version);
    assert.equal(header.clusterBytes, clusterBytes);
    assert.equal(header.virtualBytes, 8 * 1024 * 1024);
    assert.deepEqual(header.l1, { offset: 3 * clusterBytes, entries: 1 });
    assert.equal(header.backing, undefined);
  }
});

test('a header seen through a view into a larger buffer is read at the right place', () => {
  const larger = Buffer.concat([Buffer.alloc(13, 0xff), image()]);
  assert.ok(isQcow2(larger.subarray(13)));
  assert.equal(parseQcow2Header(larger.subarray(13)).virtualBytes, 8 * 1024 * 1024);
});

test('zstd compression and extended L2 entries are taken', () => {
  assert.equal(accept({ features: 8n, compression: 1 }).extendedL2, false);
  assert.equal(accept({ features: 16n }).extendedL2, true);
});

test('a backing file is read with its format, and is no image that stands alone', () => {
  const changed = {
    backing: '../../images/x/disk.raw',
    extensions: [{ type: 0xe2792aca, data: 'raw' }],
  };
  assert.deepEqual(parseQcow2Header(image(changed)).backing, {
    file: '../../images/x/disk.raw',
    format: 'raw',
  });
  refuse(changed, /backing file '..\/..\/images\/x\/disk.raw', wanted a file that stands alone/);
});

test('whatever would make QEMU open a second file or ask for a key is refused', () => {
  refuse({ backing: 'json:{"driver":"nbd"}' }, /backing file/);
  refuse({ features: 4n }, /data in another file/);
  refuse({ extensions: [{ type: 0x44415441, data: '/etc/shadow' }] }, /data in another file/);
  refuse({ encryption: 1 }, /encrypted/);
  refuse({ encryption: 2 }, /encrypted/);
  refuse({ encryption: 3 }, /crypt_method is 3/);
  refuse({ extensions: [{ type: 0x0537be77, data: '0123456789abcdef' }] }, /encrypted/);
});

test('unknown features and images that were not closed cleanly are refused', () => {
  refuse({ features: 32n }, /unknown features 0x20/);
  refuse({ features: 1n << 63n }, /unknown features/);
  refuse({ features: 1n }, /not closed cleanly/);
  refuse({ features: 2n }, /marked corrupt/);
});

test('numbers out of their bounds are refused by name', () => {
  refuse({ version: 1 }, /version is 1, wanted 2 or 3/);
  refuse({ version: 4 }, /version is 4/);
  refuse({ clusterBits: 8 }, /cluster_bits is 8, wanted 9 to 21/);
  refuse({ clusterBits: 22 }, /cluster_bits is 22/);
  refuse({ clusterBits: 0xffffffff }, /cluster_bits/);
  refuse({ virtualBytes: 0n }, /size is 0/);
  refuse({ virtualBytes: 513n }, /size is 513/);
  refuse({ virtualBytes: BigInt(maxVirtualBytes) + 512n }, /size is/);
  refuse({ virtualBytes: 1n << 63n }, /size is/);
  refuse({ l1Entries: 0 }, /l1_size is 0, wanted 1 to/);
  refuse({ l1Entries: 0xffffffff }, /l1_size/);
  refuse({ l1Offset: 3n }, /l1_table_offset is 3, wanted a multiple/);
  refuse({ l1Offset: 0n }, /l1_table_offset is 0/);
  refuse({ refcountClusters: 0 }, /refcount_table_clusters is 0/);
  refuse({ refcountClusters: 129 }, /refcount_table_clusters is 129/);
  refuse({ refcountOrder: 7 }, /refcount_order is 7/);
  refuse({ headerBytes: 96 }, /header_length is 96/);
  refuse({ headerBytes: 108 }, /header_length is 108/);
  refuse({ compression: 1 }, /compression_type is 1/);
  refuse({ compression: 2, features: 8n }, /compression_type is 2/);
  refuse({ snapshots: 65537 }, /nb_snapshots/);
  refuse({ snapshots: 1, snapshotsOffset: 7n }, /snapshots_offset is 7/);
  refuse({ clusterBits: 13, features: 16n, l1Entries: 100 }, /cluster_bits is 13 with extended L2/);
});

test('tables outside the file are refused', () => {
  refuse({ l1Offset: 8n * 65536n }, /the L1 table ends at byte/);
  refuse({ refcountOffset: 8n * 65536n }, /the refcount table ends at byte/);
  refuse({ snapshots: 1, snapshotsOffset: 8n * 65536n }, /the snapshot table ends at byte/);
});

test('an extension that runs over the first cluster is refused', () => {
  const bytes = Buffer.from(image());
  bytes.writeUInt32BE(0x6803f857, 112);
  bytes.writeUInt32BE(0xffffffff, 116);
  assert.throws(() => parseQcow2Header(bytes), { code: 'image_corrupt', message: /header extension/ });
});

test('a header cut at any byte is either refused or not needed further', () => {
  const whole = image({ backing: 'base', extensions: [{ type: 0xe2792aca, data: 'raw' }] });
  const reference = parseQcow2Header(whole);
  for (let length = 0; length <= 4200; length += 1) {
    const cut = whole.slice(0, length);
    if (length >= 4100) assert.deepEqual(parseQcow2Header(cut), reference);
    else assert.throws(() => parseQcow2Header(cut), { code: 'image_corrupt' }, `cut at ${length}`);
  }
});

/** Whatever the bytes are: a header within its bounds, or `image_corrupt`. */
function survives(bytes: Uint8Array): void {
  try {
    const header = parseQcow2Header(bytes);
    assert.ok(header.virtualBytes > 0 && header.virtualBytes <= maxVirtualBytes);
    assert.ok(header.l1.entries * 8 <= 32 * 1024 * 1024);
    assert.ok((header.backing?.file.length ?? 0) <= 1023);
    requireSelfContained(header, bytes.length);
  } catch (error) {
    assert.ok(error instanceof AppError && error.code === 'image_corrupt', String(error));
  }
}

test('one flipped bit in the header never does more than refuse it', () => {
  const whole = Buffer.from(
    image({ backing: 'base', extensions: [{ type: 0xe2792aca, data: 'raw' }] }).subarray(0, 4200),
  );
  for (let bit = 0; bit < 160 * 8; bit += 1) {
    const flipped = Buffer.from(whole);
    flipped[bit >> 3] = (flipped[bit >> 3] ?? 0) ^ (1 << (bit & 7));
    survives(flipped);
  }
});

test('random bytes behind a good magic number never do more than be refused', () => {
  fc.assert(
    fc.property(fc.uint8Array({ minLength: 0, maxLength: 300 }), fc.boolean(), (noise, version3) => {
      const start = Buffer.from([0x51, 0x46, 0x49, 0xfb, 0, 0, 0, version3 ? 3 : 2]);
      survives(Buffer.concat([start, noise]));
    }),
    { numRuns: 2000 },
  );
});

test('random changes of a good header never do more than refuse it', () => {
  const change = fc.record({ at: fc.nat(200), value: fc.nat(255) });
  fc.assert(
    fc.property(fc.array(change, { maxLength: 6 }), (changes) => {
      const bytes = Buffer.from(image().subarray(0, 4096));
      for (const { at, value } of changes) bytes[at] = value;
      survives(bytes);
    }),
    { numRuns: 2000 },
  );
});
