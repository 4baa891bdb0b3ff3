/**
 * A disk that is on its way while somebody writes to it becomes one like any other, wherever that is broken off; with
 * QEMU's block layer in its storage daemon, so without a guest.
 */
import assert from 'node:assert/strict';
import { type ChildProcess, spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { mkdtemp, readdir, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { duplexPair } from 'node:stream';
import { type TestContext, test } from 'node:test';
import { encodeNumbers } from '../../src/migration/condensed/disk-frames.ts';
import { frame } from '../../src/migration/condensed/frames.ts';
import { DiskArrival } from '../../src/migration/disk-arrival.ts';
import { newDiskManifest } from '../../src/migration/relayed/disk-manifest.ts';
import { encodeDivision } from '../../src/migration/relayed/division.ts';
import { AppError } from '../../src/model/errors.ts';
import { newId } from '../../src/model/ids.ts';
import { KiB, MiB } from '../../src/model/units.ts';
import { connectNbd, type NbdClient, serveNbd } from '../../src/nbd/index.ts';
import { delay, QmpConnection } from '../../src/qmp/index.ts';
import { nodeNames, ownDiskNode } from '../../src/vm/argv.ts';
import {
  belowExport,
  belowFile,
  belowSocket,
  isArriving,
  makeArrivingDisk,
  settleArrivedDisk,
  settleRestingDisk,
  writeBelow,
} from '../../src/vm/arriving-disk.ts';
import { openDiskContent } from '../../src/vm/disk-content.ts';
import { readQcow2Header } from '../../src/vm/image-check.ts';

const sizeBytes = 8 * MiB;
const imageBytes = 3 * MiB;
const { signal } = new AbortController();

const division = {
  migrationId: newId(),
  key: randomBytes(32),
  group: randomBytes(32).toString('hex'),
  relays: [newId()],
  replicas: 1,
  partPages: 8,
};

interface World {
  directory: string;
  disk: { file: string; imageFile: string; imageFormat: 'raw' };
  qmp: QmpConnection;
  daemon: ChildProcess;
  /** What its guest has to read there. */
  expected: Buffer;
  /** As its guest. */
  write: (offset: number, lengthBytes: number) => Promise<void>;
}

/** All of it is here below, and the guest has written over some of that. */
async function arrived(context: TestContext): Promise<World> {
  const directory = await mkdtemp(path.join(tmpdir(), 'viper-arrive-'));
  context.after(() => rm(directory, { recursive: true, force: true }));
  const [file, imageFile] = [path.join(directory, 'disk.qcow2'), path.join(directory, 'image.raw')];
  const expected = Buffer.concat([randomBytes(imageBytes)], sizeBytes);
  await writeFile(imageFile, expected.subarray(0, imageBytes));
  await makeArrivingDisk({ file, imageFile, imageFormat: 'raw', sizeBytes, signal });
  const server = await serveNbd({
    path: belowSocket(directory),
    exportName: belowExport,
    backend: {
      sizeBytes,
      isReadOnly: true,
      read: async (offset, length) => Buffer.from(expected.subarray(offset, offset + length)),
      write: async () => {},
      writeZeroes: async () => {},
      trim: async () => {},
      flush: async () => {},
    },
  });
  context.after(() => server[Symbol.asyncDispose]());
  const writer = await writeBelow(directory, signal);
  const below = await connectNbd({ path: writer.socketPath, exportName: belowExport });
  await below.write(MiB, put(expected, MiB, MiB));
  await below.write(6 * MiB, put(expected, 6 * MiB, 100 * KiB));
  await below.flush();
  await below[Symbol.asyncDispose]();
  await writer[Symbol.asyncDispose]();

  const monitor = path.join(directory, 'monitor');
  const daemon = spawn(
    'qemu-storage-daemon',
    ['--chardev', `socket,id=q,path=${monitor},server=on,wait=off`, '--monitor', 'q'],
    { stdio: 'ignore' },
  );
  context.after(() => daemon.kill('SIGKILL'));
  const qmp = await connected(monitor);
  const { source, diskFile, disk } = nodeNames;
  await qmp.execute('blockdev-add', {
    driver: 'nbd',
    'node-name': source,
    server: { type: 'unix', path: belowSocket(directory) },
    export: belowExport,
    'read-only': true,
  });
  await qmp.execute('blockdev-add', { driver: 'file', 'node-name': diskFile, filename: file });
  await qmp.execute('blockdev-add', { ...ownDiskNode, backing: source });
  const guestPath = path.join(directory, 'guest');
  await qmp.execute('nbd-server-start', { addr: { type: 'unix', data: { path: guestPath } } });
  await qmp.execute('block-export-add', {
    type: 'nbd',
    id: disk,
    name: disk,
    'node-name': disk,
    writable: true,
  });
  const guest: NbdClient = await connectNbd({ path: guestPath, exportName: disk });
  const write = async (offset: number, length: number): Promise<void> => {
    await guest.write(offset, put(expected, offset, length));
    await guest.flush();
  };
  await write(MiB + 4 * KiB, 4 * KiB);
  await write(5 * MiB, 200 * KiB);
  return { directory, disk: { file, imageFile, imageFormat: 'raw' }, qmp, daemon, expected, write };
}

function put(expected: Buffer, offset: number, lengthBytes: number): Buffer {
  const bytes = randomBytes(lengthBytes);
  bytes.copy(expected, offset);
  return bytes;
}

async function connected(monitor: string): Promise<QmpConnection> {
  for (;;) {
    const found = await QmpConnection.connect(monitor).catch(() => undefined);
    if (found) return found;
    await delay(20);
  }
}

/** It is like any other, and has what its guest has to read. Nobody has it open. */
async function assertSettled({ directory, disk, expected }: World): Promise<void> {
  assert.equal(await isArriving(directory), false);
  const { backing } = await readQcow2Header(disk.file);
  assert.deepEqual(backing, { file: './image.raw', format: 'raw' });
  assert.deepEqual(
    (await readdir(directory)).filter((name) => /below|lower/.test(name)),
    [],
  );
  await using content = await openDiskContent(disk.file, 'qcow2');
  const found = Buffer.alloc(sizeBytes);
  await content.read(0, found);
  assert.ok(found.equals(expected), 'it has another content');
}

async function end({ daemon }: World, how: NodeJS.Signals): Promise<void> {
  daemon.kill(how);
  await once(daemon, 'exit');
}

test('while somebody writes it becomes a disk like any other, and may be written on', async (context) => {
  const world = await arrived(context);
  await settleArrivedDisk(world.qmp, world.disk, signal);
  await world.write(2 * MiB, 10 * KiB);
  await world.write(6 * MiB, 10 * KiB);
  const nodes = await world.qmp.execute('query-named-block-nodes', { flat: true });
  const names = nodes.map((node) => node['node-name']);
  for (const gone of [nodeNames.source, nodeNames.below]) assert.ok(!names.includes(gone), gone);
  await end(world, 'SIGTERM');
  await assertSettled(world);
});

test('a daemon that stops leaves those who read to the next one, without an error', async (context) => {
  const directory = await mkdtemp(path.join(tmpdir(), 'viper-arrive-'));
  context.after(() => rm(directory, { recursive: true, force: true }));
  const [file, imageFile] = [path.join(directory, 'disk.qcow2'), path.join(directory, 'image.raw')];
  const image = randomBytes(imageBytes);
  await writeFile(imageFile, image);
  await makeArrivingDisk({ file, imageFile, imageFormat: 'raw', sizeBytes, signal });
  const manifest = newDiskManifest(division, sizeBytes);
  manifest.add({ slab: 1, parts: [50], holders: [0], runs: [[256, 2]] });
  const start = async (kept: Buffer | undefined) => {
    const arrival = new DiskArrival({
      directory,
      file,
      sizeBytes,
      image: { file: imageFile, format: 'raw' },
      readManifest: async () => kept,
      writeManifest: async () => {},
      removeManifest: async () => {},
      openRelay: () => Promise.reject(new AppError('peer_unreachable', 'The relay is away')),
      tellOperator: () => {},
    });
    const isKnown = await arrival.reopen();
    return { arrival, isKnown };
  };
  // One that does not know where the rest is answers nobody.
  const unknowing = await start(undefined);
  assert.equal(unknowing.isKnown, false);
  await assert.rejects(connectNbd({ path: belowSocket(directory), exportName: belowExport }));
  const { arrival } = await start(manifest.toBytes());
  await using reader = await connectNbd({ path: belowSocket(directory), exportName: belowExport });
  assert.ok((await reader.read(0, 5000)).equals(image.subarray(0, 5000)), 'what the image has is here');
  const reading = assert.rejects(reader.read(MiB, 5000), { code: 'peer_unreachable' });
  await arrival.end({ drop: false });
  await reading;
});

test('what fails on the way is told and tried again, and a key that nobody needs does not stay', async (context) => {
  const directory = await mkdtemp(path.join(tmpdir(), 'viper-arrive-'));
  context.after(() => rm(directory, { recursive: true, force: true }));
  const [file, imageFile] = [path.join(directory, 'disk.qcow2'), path.join(directory, 'image.raw')];
  await writeFile(imageFile, randomBytes(imageBytes));
  await makeArrivingDisk({ file, imageFile, imageFormat: 'raw', sizeBytes, signal });
  const manifest = newDiskManifest(division, sizeBytes);
  let kept: Buffer | undefined;
  const told: string[] = [];
  const failures = new Set<string>();
  const failOnce = (what: string): void => {
    if (failures.delete(what)) throw new Error(`The manifest cannot be ${what}`);
  };
  const start = () =>
    new DiskArrival({
      directory,
      file,
      sizeBytes,
      image: { file: imageFile, format: 'raw' },
      readManifest: async () => kept,
      writeManifest: async (bytes) => {
        failOnce('written');
        kept = bytes;
      },
      removeManifest: async () => {
        failOnce('removed');
        kept = undefined;
      },
      openRelay: async () => {
        // They may have forgotten it by the time that it is read again.
        if (!(await isArriving(directory))) assert.equal(kept, undefined);
        throw new AppError('peer_unreachable', 'The relay is away');
      },
      tellOperator: (message) => void told.push(message),
      retryMs: 1,
    });
  const arrival = start();
  await arrival.listen();
  const [near, far] = duplexPair();
  near.write(encodeDivision(division));
  near.end(encodeNumbers(frame.diskFlush, [1]));
  near.resume();
  await arrival.take(far);
  assert.ok(kept);
  failures.add('written').add('removed');
  await arrival.settle(null);
  assert.equal(kept, undefined);
  assert.match(told.join('\n'), /cannot be written\n.*cannot be removed/);
  assert.deepEqual((await readQcow2Header(file)).backing, { file: './image.raw', format: 'raw' });
  // As a daemon leaves it that ended between the two.
  kept = manifest.toBytes();
  assert.equal(await start().reopen(), true);
  assert.equal(kept, undefined);
});

test('one daemon after the other may break off on the way', async (context) => {
  const world = await arrived(context);
  const { qmp, disk } = world;
  // With its nodes, and with the disk turned to what is below; then in the middle of it.
  const { image, below } = nodeNames;
  const file = (filename: string) => ({ driver: 'file', filename, 'read-only': true });
  await qmp.execute('blockdev-add', {
    driver: 'raw',
    'node-name': image,
    'read-only': true,
    file: file(disk.imageFile),
  });
  await qmp.execute('blockdev-add', {
    driver: 'qcow2',
    'node-name': below,
    'read-only': true,
    file: file(belowFile(world.directory)),
    backing: image,
  });
  await qmp.execute('blockdev-reopen', { options: [{ ...ownDiskNode, backing: below }] });
  await settleArrivedDisk(qmp, disk, AbortSignal.abort()).catch(() => {});
  await world.write(MiB, 12 * KiB);
  // It may have come to its end meanwhile.
  if (await isArriving(world.directory)) await settleArrivedDisk(qmp, disk, signal);
  await end(world, 'SIGTERM');
  await assertSettled(world);
});

test('QEMU may end before, or in the middle', async (context) => {
  for (const isBegun of [false, true]) {
    const world = await arrived(context);
    if (isBegun) await settleArrivedDisk(world.qmp, world.disk, AbortSignal.abort()).catch(() => {});
    await end(world, 'SIGKILL');
    if (await isArriving(world.directory)) await settleRestingDisk(world.disk.file, signal);
    await assertSettled(world);
  }
});
