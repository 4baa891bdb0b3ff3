/** Both agents of a disk between an NBD client that stands in for QEMU's mirror and an export in memory. */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { duplexPair } from 'node:stream';
import { after, before, test } from 'node:test';
import fc from 'fast-check';
import { connectNbd, type NbdClient, serveNbd } from '../../nbd/index.ts';
import { MemoryBackend } from '../../nbd/memory-backend.ts';
import { type BlockReader, blockBytes, digestBlocks, MemoryIndex } from '../../pages/index.ts';
import { exportName } from '../mirror.ts';
import { diskReader, takeDisk } from './disk-destination.ts';
import { DiskSource } from './disk-source.ts';
import { noStatistics } from './statistics.ts';

const diskBytes = 100 * blockBytes + 512;
let directory = '';
let count = 0;

before(async () => {
  directory = await mkdtemp(path.join(tmpdir(), 'viper-disk-agents-'));
});
after(() => rm(directory, { recursive: true }));

interface Set {
  name: string;
  index: MemoryIndex;
  blocks: BlockReader;
}

/** `qemu` writes at the source; what arrives is in `arrived`. */
interface World extends AsyncDisposable {
  qemu: NbdClient;
  arrived: MemoryBackend;
  mirrored: MemoryIndex;
  source: DiskSource;
  /** As the destination reads what was mirrored, for memory. */
  reader: BlockReader;
  cut(): void;
  ended: Promise<unknown[]>;
}

async function makeWorld(sets: readonly Set[] = []): Promise<World> {
  await using undo = new AsyncDisposableStack();
  const socket = (name: string) => path.join(directory, `${count}-${name}`);
  count += 1;
  const arrived = new MemoryBackend(diskBytes);
  undo.use(await serveNbd({ path: socket('export'), exportName, backend: arrived }));
  const disk = undo.use(await connectNbd({ path: socket('export'), exportName }));
  const [atSource, atDestination] = duplexPair();
  for (const link of [atSource, atDestination]) link.on('error', () => {});
  const door = createServer({ pauseOnConnect: true }).listen(socket('door'));
  undo.defer(() => void door.close());
  const connecting = connectNbd({ path: socket('door'), exportName });
  connecting.catch(() => {});
  const [qemuSocket] = await once(door, 'connection');
  const mirrored = new MemoryIndex({ maxEntries: 1000 });
  const source = new DiskSource({
    qemu: qemuSocket,
    link: atSource,
    openIndex: async (name) => sets.find((set) => set.name === name)?.index,
    mirrored,
    limitBps: () => undefined,
    statistics: noStatistics(),
  });
  const ended = Promise.allSettled([
    source.run(),
    takeDisk({
      disk,
      link: atDestination,
      sets: sets.map(({ name }) => name),
      openReader: async (name) => sets.find((set) => set.name === name)!.blocks,
    }),
  ]);
  const qemu = undo.use(await connecting);
  const stack = undo.move();
  return {
    qemu,
    arrived,
    mirrored,
    source,
    reader: diskReader(disk),
    cut: () => atSource.destroy(),
    ended,
    async [Symbol.asyncDispose]() {
      await stack.disposeAsync();
      await ended;
    },
  };
}

/** Few contents, so that many are equal; some random. */
const anyContent = fc.oneof(fc.nat({ max: 4 }), fc.constant(-1));
const contentOf = (kind: number, lengthBytes: number): Buffer =>
  kind < 0 ? randomBytes(lengthBytes) : Buffer.alloc(lengthBytes, kind);
const anyStep = fc.oneof(
  {
    weight: 6,
    arbitrary: fc.record({
      kind: fc.constant('blocks'),
      at: fc.nat({ max: 95 }),
      count: fc.integer({ min: 1, max: 5 }),
      content: anyContent,
    }),
  },
  {
    weight: 2,
    arbitrary: fc.record({
      kind: fc.constant('ragged'),
      at: fc.nat({ max: diskBytes - 9000 }),
      count: fc.integer({ min: 1, max: 9000 }),
      content: anyContent,
    }),
  },
  {
    weight: 1,
    arbitrary: fc.record({
      kind: fc.constant('zeroes'),
      at: fc.nat({ max: diskBytes - 20_000 }),
      count: fc.integer({ min: 1, max: 20_000 }),
      content: fc.constant(0),
    }),
  },
  {
    weight: 1,
    arbitrary: fc.record({
      kind: fc.constant('trim'),
      at: fc.nat({ max: diskBytes - 20_000 }),
      count: fc.integer({ min: 1, max: 20_000 }),
      content: fc.constant(0),
    }),
  },
  {
    weight: 1,
    arbitrary: fc.record({
      kind: fc.constant('flush'),
      at: fc.constant(0),
      count: fc.constant(0),
      content: fc.constant(0),
    }),
  },
);

type Step = { kind: string; at: number; count: number; content: number };

/** Does all steps without waiting for those that do not touch, as QEMU does, and notes what the disk must be. */
async function perform(qemu: NbdClient, steps: readonly Step[], wanted: Buffer): Promise<void> {
  for (const { kind, at, count: size, content } of steps) {
    if (kind === 'flush') {
      await qemu.flush();
      continue;
    }
    const [offset, lengthBytes] = kind === 'blocks' ? [at * blockBytes, size * blockBytes] : [at, size];
    const bytes = contentOf(content, lengthBytes);
    bytes.copy(wanted, offset);
    if (kind === 'zeroes') await qemu.writeZeroes(offset, lengthBytes);
    else if (kind === 'trim') await qemu.trim(offset, lengthBytes);
    else await qemu.write(offset, bytes);
  }
}

test('after a flush the disk at the destination is what QEMU wrote, whatever it wrote over what', async () => {
  await fc.assert(
    fc.asyncProperty(fc.array(anyStep, { maxLength: 60 }), async (steps) => {
      await using world = await makeWorld();
      const wanted = Buffer.alloc(diskBytes);
      await perform(world.qemu, steps, wanted);
      await world.qemu.flush();
      assert.ok(world.arrived.bytes.equals(wanted));
      // What memory refers to is there, too.
      const digests = digestBlocks(wanted);
      const found = await world.mirrored.lookup(digests);
      assert.ok(!found.some((block) => world.source.isPending(block)));
      for (const [i, block] of found.entries()) {
        if (block === 0xffff_ffff) continue;
        const there = await world.reader.read(Uint32Array.of(block));
        assert.ok(there.equals(wanted.subarray(i * blockBytes, (i + 1) * blockBytes)), `block ${block}`);
      }
    }),
    { numRuns: 25 },
  );
});

function imageSet(content: Buffer, shown = content): Set {
  const index = new MemoryIndex({ maxEntries: 1000 });
  const digests = digestBlocks(content);
  for (let block = 0; block < content.length / blockBytes; block += 1) index.set(block, digests, block * 32);
  const blocks: BlockReader = {
    blockCount: content.length / blockBytes,
    read: async (numbers) =>
      Buffer.concat(
        [...numbers].map((block) => shown.subarray(block * blockBytes, (block + 1) * blockBytes)),
      ),
    async [Symbol.asyncDispose]() {},
  };
  return { name: 'image:sha256:00', index, blocks };
}

test('what both ends hold, and what was sent before, is not sent again', async () => {
  const image = randomBytes(20 * blockBytes);
  const own = randomBytes(20 * blockBytes);
  await using world = await makeWorld([imageSet(image)]);
  await world.qemu.write(0, image);
  await world.qemu.write(40 * blockBytes, own);
  await world.qemu.flush();
  const before = world.source.statistics.wireBytes;
  assert.ok(before > own.length && before < own.length + 5000, `${before} bytes`);
  await world.qemu.write(70 * blockBytes, own);
  await world.qemu.write(20 * blockBytes, Buffer.alloc(20 * blockBytes));
  await world.qemu.flush();
  assert.ok(world.source.statistics.wireBytes - before < 2000);
  assert.ok(world.arrived.bytes.subarray(70 * blockBytes, 90 * blockBytes).equals(own));
  assert.ok(world.arrived.bytes.subarray(0, 20 * blockBytes).equals(image));
});

test('a set that lies costs bytes and nothing else', async () => {
  const image = randomBytes(20 * blockBytes);
  const wanted = Buffer.alloc(diskBytes);
  await using world = await makeWorld([imageSet(image, randomBytes(image.length))]);
  const steps = Array.from({ length: 15 }, (_, i) => i);
  for (const i of steps) {
    const piece = image.subarray(i * blockBytes, (i + 3) * blockBytes);
    piece.copy(wanted, i * 2 * blockBytes);
    await world.qemu.write(i * 2 * blockBytes, piece);
  }
  await world.qemu.flush();
  assert.ok(world.arrived.bytes.equals(wanted));
  assert.ok(world.source.statistics.repairedPages > 0);
});

test('what was written is on the disk there a moment later, before QEMU asks for it', async () => {
  await using world = await makeWorld();
  const { arrived, qemu } = world;
  const flushed = Promise.withResolvers<void>();
  const flush = arrived.flush.bind(arrived);
  arrived.flush = async () => {
    await flush();
    flushed.resolve();
  };
  await qemu.write(0, randomBytes(blockBytes));
  await flushed.promise;
});

test('when the link breaks, no flush succeeds any more, and both agents end', async () => {
  await using world = await makeWorld();
  await world.qemu.write(0, randomBytes(blockBytes));
  await world.qemu.flush();
  world.cut();
  await assert.rejects(world.qemu.flush());
  const [source] = (await world.ended) as PromiseSettledResult<void>[];
  assert.equal(source!.status, 'rejected');
});

test('a destination whose disk fails ends the mirror', async () => {
  await using world = await makeWorld();
  world.arrived.write = async () => {
    throw Object.assign(new Error('no space'), { code: 'ENOSPC' });
  };
  await world.qemu.write(0, randomBytes(blockBytes));
  await assert.rejects(world.qemu.flush());
});
