/** A disk by way of relays: real protocols, with memory for QEMU's disk and for what lies below at the destination. */
import assert from 'node:assert/strict';
import { randomBytes, randomInt } from 'node:crypto';
import { once } from 'node:events';
import { mkdtempSync, rmSync } from 'node:fs';
import { createServer, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { type Duplex, duplexPair } from 'node:stream';
import { type TestContext, test } from 'node:test';
import { AppError } from '../../model/errors.ts';
import { newId, type Uuid } from '../../model/ids.ts';
import { KiB, MiB } from '../../model/units.ts';
import { connectNbd, type NbdClient, NbdError } from '../../nbd/index.ts';
import { delay } from '../../qmp/index.ts';
import { exportName } from '../mirror.ts';
import { ArrivingDisk, type ArrivingDiskOptions } from './arriving-disk.ts';
import { DiskDivider, type DiskDividerOptions } from './disk-divider.ts';
import { DiskManifest, newDiskManifest } from './disk-manifest.ts';
import { Divider } from './divider.ts';
import type { Division } from './division.ts';
import { endsOf, type FakeRelay, fakeRelays, type RelayOptions } from './fake-relay.ts';
import { takeDiskManifest } from './take-disk-manifest.ts';

/** With a last block that is none. */
const sizeBytes = 6 * MiB + 512;

interface World {
  relays: FakeRelay[];
  /** What QEMU has at the source. */
  disk: Buffer;
  divider: DiskDivider;
  /** As QEMU's mirror, which writes what the guest has written. */
  mirror: NbdClient;
  write: (offset: number, bytes: Buffer) => Promise<void>;
  /** As it was written down last. */
  kept: () => DiskManifest;
  /** A new one, as after a restart of the daemon. */
  arrive: (manifest: DiskManifest, more?: Partial<ArrivingDiskOptions>) => ArrivingDisk;
  /** What the destination has at first. */
  image: Buffer;
}

async function open(
  context: TestContext,
  wanted: RelayOptions[] = [{}, {}, {}],
  more: Partial<DiskDividerOptions> = {},
): Promise<World> {
  const relays = fakeRelays(wanted);
  const directory = mkdtempSync(path.join(tmpdir(), 'viper-disk-'));
  context.after(() => rmSync(directory, { recursive: true, force: true }));
  const disk = randomBytes(sizeBytes);
  const image = Buffer.from(disk);
  const [near, far] = duplexPair();
  let bytes: Buffer | undefined;
  const taken = takeDiskManifest(far, {
    sizeBytes,
    keep: async (manifest) => {
      bytes = manifest.toBytes();
    },
  });
  taken.catch(() => {});
  const { socket, client } = await socketPair(path.join(directory, 'mirror'));
  const slabs = new Divider({ migrationId: newId(), relays: endsOf(relays), replicas: 2 });
  await slabs.open();
  const divider = new DiskDivider({
    qemu: socket,
    link: near,
    divider: slabs,
    readBack: async (offset, lengthBytes) => Buffer.from(disk.subarray(offset, offset + lengthBytes)),
    ...more,
  });
  divider.run().catch(() => {});
  const mirror = await client;
  context.after(() => {
    divider.close({ drop: false });
    return mirror[Symbol.asyncDispose]();
  });
  return {
    relays,
    disk,
    divider,
    mirror,
    write: async (offset, content) => {
      content.copy(disk, offset);
      await mirror.write(offset, content);
    },
    kept: () => DiskManifest.fromBytes(bytes!) as DiskManifest,
    image,
    arrive: (manifest, more = {}) => {
      const arriving = new ArrivingDisk({
        sizeBytes,
        openBelow: async () => ({ client: clientOf(image), close: async () => {} }),
        openWhole: async () => ({
          read: async (offset, into) => void image.copy(into, 0, offset),
          async [Symbol.asyncDispose]() {},
        }),
        open: ({ division }, relay) => openThere(relays, division.relays[relay]!, division.group),
        onLost: () => {},
        ...more,
      });
      arriving.begin(manifest);
      context.after(() => arriving.end({ drop: false }));
      return arriving;
    },
  };
}

const openThere = (relays: FakeRelay[], id: Uuid, group: string): Promise<Duplex> =>
  relays.find((relay) => relay.id === id)!.openThere(group);

async function socketPair(file: string): Promise<{ socket: Socket; client: Promise<NbdClient> }> {
  const server = createServer({ pauseOnConnect: true }).listen(file);
  await once(server, 'listening');
  const client = connectNbd({ path: file, exportName });
  client.catch(() => {});
  const [socket] = (await once(server, 'connection')) as [Socket];
  server.close();
  return { socket, client };
}

const clientOf = (image: Buffer) => ({
  read: async (offset: number, lengthBytes: number) =>
    Buffer.from(image.subarray(offset, offset + lengthBytes)),
  write: async (offset: number, bytes: Buffer) => void bytes.copy(image, offset),
  writeZeroes: async (offset: number, lengthBytes: number) =>
    void image.fill(0, offset, offset + lengthBytes),
  flush: async () => {},
});

/** Writes of every kind, many over others. */
async function scribble({ write, mirror, disk }: World, count: number): Promise<void> {
  for (let turn = 0; turn < count; turn += 1) {
    const isWhole = turn % 3 === 0;
    const unit = isWhole ? 4 * KiB : 512;
    const offset = randomInt(Math.floor(sizeBytes / unit) - 1) * unit;
    const length = Math.min(sizeBytes - offset, (1 + randomInt(isWhole ? 60 : 40)) * unit);
    if (turn % 7 === 0) {
      disk.fill(0, offset, offset + length);
      await (turn % 2 === 0 ? mirror.writeZeroes(offset, length) : mirror.trim(offset, length));
    } else await write(offset, randomBytes(length));
    if (turn % 40 === 0) await mirror.flush();
  }
}

async function readAll(disk: ArrivingDisk): Promise<Buffer> {
  const pieces = [];
  for (let at = 0; at < sizeBytes; at += 100_000)
    pieces.push(await disk.read(at, Math.min(100_000, sizeBytes - at)));
  return Buffer.concat(pieces);
}

const sameAs = (found: Buffer, wanted: Buffer): void =>
  assert.ok(found.equals(wanted), 'the disk is another');

test('a disk is as its guest has written it, block by block and as a whole, also after a restart', async (context) => {
  const world = await open(context);
  await scribble(world, 300);
  assert.equal(world.divider.isSafe, false);
  await world.divider.end();
  while (!world.divider.isSafe) await delay(1);
  const first = world.arrive(world.kept());
  // In no order that it came in.
  for (let turn = 0; turn < 50; turn += 1) {
    const at = randomInt(sizeBytes - 5000);
    sameAs(await first.read(at, 5000), world.disk.subarray(at, at + 5000));
  }
  const second = world.arrive(world.kept());
  const reading = readAll(second);
  await second.fetchAll();
  sameAs(await reading, world.disk);
  sameAs(await readAll(second), world.disk);
});

test('a relay that is lost while the disk leaves, or one that lies, costs nothing', async (context) => {
  const world = await open(context, [{ diesAfter: 3 }, { lies: true }, {}]);
  await scribble(world, 200);
  await world.divider.end();
  assert.ok(world.relays[0]!.isDead);
  sameAs(await readAll(world.arrive(world.kept())), world.disk);
});

test('relays keep a disk for long when all of it is there and no sooner, and the source stays until they know', async (context) => {
  const world = await open(context);
  const prolonged = new Set<FakeRelay>();
  for (const relay of world.relays) relay.store.prolong = () => void prolonged.add(relay);
  await scribble(world, 100);
  await world.mirror.flush();
  assert.equal(prolonged.size, 0, 'what a source leaves that is lost now is to go soon');
  await world.divider.end();
  while (!world.divider.isSafe) await delay(1);
  assert.equal(prolonged.size, 3);
});

test('one that is lost when all was told makes the source stay until others have what it had', async (context) => {
  const world = await open(context);
  await scribble(world, 100);
  await world.divider.end();
  while (!world.divider.isSafe) await delay(1);
  world.relays[0]!.die();
  while (world.divider.isSafe) await delay(1);
  while (!world.divider.isSafe) await delay(5);
  // So that the next one may be lost as well.
  world.relays[1]!.die();
  sameAs(await readAll(world.arrive(world.kept())), world.disk);
});

test('whoever writes it here may be lost, and its disk full: then it is fetched again', {
  timeout: 60_000,
}, async (context) => {
  const world = await open(context);
  const at = Buffer.from(world.image);
  await scribble(world, 100);
  await world.divider.end();
  let opened = 0;
  let writes = 0;
  const told: string[] = [];
  const arriving = world.arrive(world.kept(), {
    openBelow: async () => {
      opened += 1;
      // What the first one has written, it has written nowhere.
      const client = clientOf(opened === 1 ? Buffer.from(at) : at);
      const lost = () => Promise.reject(new AppError('peer_unreachable', 'The server is gone'));
      const write = async (offset: number, bytes: Buffer): Promise<void> => {
        writes += 1;
        if (writes === 5) throw new NbdError('ENOSPC', 'no space');
        return client.write(offset, bytes);
      };
      return { client: { ...client, write, ...(opened === 1 && { flush: lost }) }, close: async () => {} };
    },
    openWhole: async () => ({
      read: async (offset, into) => void at.copy(into, 0, offset),
      async [Symbol.asyncDispose]() {},
    }),
    onLost: (message) => void told.push(message),
  });
  await arriving.fetchAll();
  assert.equal(opened, 2);
  assert.match(told.join(), /cannot be written here: no space/);
  sameAs(await readAll(arriving), world.disk);
});

test('what a guest reads is fetched again, too, when whoever had it open is lost before it answers', async (context) => {
  const world = await open(context);
  const at = Buffer.from(world.image);
  await world.write(0, randomBytes(64 * KiB));
  await world.divider.end();
  let opened = 0;
  const arriving = world.arrive(world.kept(), {
    openBelow: async () => {
      opened += 1;
      // What the first one has written, it has written nowhere.
      const client = clientOf(opened === 1 ? Buffer.from(at) : at);
      const lost = () => Promise.reject(new AppError('peer_unreachable', 'The server is gone'));
      return { client: { ...client, ...(opened === 1 && { read: lost }) }, close: async () => {} };
    },
  });
  sameAs(await arriving.read(0, 64 * KiB), world.disk.subarray(0, 64 * KiB));
  assert.equal(opened, 2);
});

test('a disk that cannot be written out or opened is read all the same, and tried again', {
  timeout: 20_000,
}, async (context) => {
  const world = await open(context);
  const at = Buffer.from(world.image);
  await world.write(0, randomBytes(64 * KiB));
  await world.divider.end();
  let opened = 0;
  let failures = 2;
  const arriving = world.arrive(world.kept(), {
    openBelow: async () => {
      opened += 1;
      const client = clientOf(opened === 1 ? Buffer.from(at) : at);
      // What a failed flush has not written is nowhere.
      const flush = () => Promise.reject(new NbdError('EIO', 'no disk'));
      return { client: { ...client, ...(opened === 1 && { flush }) }, close: async () => {} };
    },
    openWhole: async () => {
      failures -= 1;
      if (failures >= 0) throw new AppError('internal', 'too many open files');
      return {
        read: async (offset, into) => void at.copy(into, 0, offset),
        async [Symbol.asyncDispose]() {},
      };
    },
  });
  await assert.rejects(arriving.fetchAll(), /no disk/);
  const failing = assert.rejects(arriving.fetchAll(), /too many open files/);
  sameAs(await arriving.read(0, 64 * KiB), world.disk.subarray(0, 64 * KiB));
  await failing;
  sameAs(await arriving.read(0, 64 * KiB), world.disk.subarray(0, 64 * KiB));
  await assert.rejects(arriving.fetchAll(), /too many open files/);
  await arriving.fetchAll();
  sameAs(await readAll(arriving), world.disk);
});

test('where relays have no room for it the mirror fails, and says why', {
  timeout: 60_000,
}, async (context) => {
  const world = await open(context, [{ quotaBytes: 2 * MiB }, { quotaBytes: 2 * MiB }]);
  await assert.rejects(world.mirror.write(0, randomBytes(5 * MiB)).then(() => world.mirror.flush()));
  assert.match(world.divider.failure!.message, /not enough relays/);
  assert.equal(world.divider.isSafe, false);
});

test('a relay that hangs holds nobody up for ever where there is no other', {
  timeout: 60_000,
}, async (context) => {
  let isPaused = true;
  const world = await open(context, [{}, {}], { stalledMs: 500, isPaused: () => isPaused });
  world.relays[1]!.store.put = () => new Promise(() => {});
  setTimeout(() => {
    assert.equal(world.divider.failure, undefined, 'one that is paused is in no hurry');
    isPaused = false;
  }, 1500);
  await assert.rejects(world.mirror.write(0, randomBytes(4 * KiB)).then(() => world.mirror.flush()));
  assert.match(world.divider.failure!.message, /have taken nothing of the disk/);
});

test('a migration that is cancelled does not wait for relays at its switchover', {
  timeout: 20_000,
}, async (context) => {
  const world = await open(context, [{}, {}]);
  await world.write(0, randomBytes(4 * KiB));
  world.relays[1]!.store.put = () => new Promise(() => {});
  const cancel = new AbortController();
  const ending = world.divider.end(cancel.signal);
  cancel.abort();
  await assert.rejects(ending, { code: 'cancelled' });
  await assert.rejects(world.divider.end(cancel.signal), { code: 'cancelled' });
  assert.equal(world.divider.isSafe, false);
});

test('of a block in several slabs the last one holds, whenever it was told', () => {
  const division: Division = {
    migrationId: newId(),
    key: randomBytes(32),
    group: randomBytes(32).toString('hex'),
    relays: [newId()],
    replicas: 1,
    partPages: 8,
  };
  const manifest = newDiskManifest(division, 10 * 4096);
  manifest.add({ slab: 3, parts: [9], holders: [0], runs: [[4, 2]] });
  manifest.add({ slab: 1, parts: [9], holders: [0], runs: [[3, 2]] });
  const check = (each: DiskManifest) => {
    assert.deepEqual(
      [3, 4, 5, 6].map((block) => each.whereIs(block)?.slab.slab),
      [1, 3, 3, undefined],
    );
    assert.deepEqual([each.isGood(4, 1), each.isGood(4, 3), each.isGood(3, 1)], [false, true, true]);
  };
  check(manifest);
  const again = DiskManifest.fromBytes(manifest.toBytes());
  assert.ok(again instanceof DiskManifest);
  check(again);
});
