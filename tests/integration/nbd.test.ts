/** Our NBD server and client against QEMU's: its tools as clients, qemu-nbd as server, and a mirror of a real QEMU. */
import assert from 'node:assert/strict';
import { execFile, execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, before, test } from 'node:test';
import { promisify } from 'node:util';
import fc from 'fast-check';
import {
  exportName,
  finishMirror,
  mirrorJob,
  startMirror,
  waitUntilMirrored,
} from '../../src/migration/mirror.ts';
import { MiB } from '../../src/model/units.ts';
import { connectNbd, type NbdClient, serveNbd } from '../../src/nbd/index.ts';
import { MemoryBackend } from '../../src/nbd/memory-backend.ts';
import { Machine } from '../../src/vm/machine.ts';
import { until, Workshop } from './tiny-vm.ts';

const exec = promisify(execFile);
let directory = '';
let socket = '';
const uri = () => `nbd+unix:///disk?socket=${socket}`;
const at = (name: string) => path.join(directory, name);
const { signal } = new AbortController();

before(async () => {
  directory = await mkdtemp(path.join(tmpdir(), 'viper-nbd-'));
  socket = at('nbd.sock');
});
after(() => rm(directory, { recursive: true }));

/** The server is in this process, so its clients must not block it. */
const qemuIo = async (...commands: string[]): Promise<string> => {
  const args = ['-f', 'raw', ...commands.flatMap((each) => ['-c', each]), uri()];
  return (await exec('qemu-io', args, { timeout: 60_000 })).stdout;
};

test('qemu-io writes, zeroes, discards and reads back what our server has', async () => {
  const backend = new MemoryBackend(16 * MiB);
  await using _server = await serveNbd({ path: socket, exportName: 'disk', backend });
  await qemuIo(
    'write -P 0x5a 4k 3M',
    'write -P 0x11 5M 512',
    'write -z 1M 64k',
    'write -z -u 2M 64k',
    'discard 6M 1M',
    'write -f -P 0x77 15M 1M',
    'flush',
    'read -P 0x5a 4k 64k',
    'read -P 0 1M 64k',
    'aio_write -P 0x22 8M 2M',
    'aio_write -P 0x23 10M 2M',
    'aio_flush',
    'read -P 0x23 10M 2M',
  );
  const wanted = Buffer.alloc(16 * MiB);
  wanted.fill(0x5a, 4096, 4096 + 3 * MiB);
  wanted.fill(0x11, 5 * MiB, 5 * MiB + 512);
  wanted.fill(0, MiB, MiB + 65_536);
  wanted.fill(0, 2 * MiB, 2 * MiB + 65_536);
  wanted.fill(0x77, 15 * MiB);
  wanted.fill(0x22, 8 * MiB, 10 * MiB);
  wanted.fill(0x23, 10 * MiB, 12 * MiB);
  assert.ok(backend.bytes.equals(wanted));
  for (const done of ['write', 'writeZeroes', 'trim', 'flush']) assert.ok(backend.done.includes(done), done);
});

test('qemu-img learns from our server what is zero, and copies in and out', async () => {
  const backend = new MemoryBackend(16 * MiB);
  await using _server = await serveNbd({ path: socket, exportName: 'disk', backend });
  const disk = Buffer.alloc(16 * MiB);
  for (let i = 3 * MiB; i < 5 * MiB; i += 4) disk.writeUInt32LE(Math.imul(i, 2654435761) >>> 0, i);
  await writeFile(at('in.raw'), disk);
  await exec('qemu-img', ['convert', '-n', '-f', 'raw', '-O', 'raw', at('in.raw'), uri()]);
  assert.ok(backend.bytes.equals(disk));
  const map = JSON.parse((await exec('qemu-img', ['map', '--output=json', '-f', 'raw', uri()])).stdout);
  assert.deepEqual(
    map.map((each: { start: number; length: number; zero: boolean }) => [each.start, each.length, each.zero]),
    [
      [0, 3 * MiB, true],
      [3 * MiB, 2 * MiB, false],
      [5 * MiB, 11 * MiB, true],
    ],
  );
  await exec('qemu-img', ['convert', '-f', 'raw', '-O', 'raw', uri(), at('out.raw')]);
  assert.ok((await readFile(at('out.raw'))).equals(disk));
});

test('a client of QEMU that wants another export is told so', async () => {
  await using _server = await serveNbd({ path: socket, exportName: 'disk', backend: new MemoryBackend(MiB) });
  await assert.rejects(
    exec('qemu-img', ['info', `nbd+unix:///other?socket=${socket}`]),
    /not (available|present|known)|rejected/,
  );
  await qemuIo('read 0 512');
});

/** qemu-nbd with one export; it ends with the test. */
async function qemuNbd(file: string, format: string): Promise<AsyncDisposable> {
  const listening = at(`qemu-nbd-${process.hrtime.bigint()}.sock`);
  socket = listening;
  const args = ['--persistent', '--discard=unmap', '-x', 'disk', '-f', format, '-k', listening, file];
  const child = spawn('qemu-nbd', args, { stdio: 'inherit' });
  const ended = once(child, 'exit');
  const connect = () => connectNbd({ path: listening, exportName: 'disk' }).catch(() => undefined);
  const client = await until(connect, (each) => each !== undefined);
  await client![Symbol.asyncDispose]();
  return {
    async [Symbol.asyncDispose]() {
      child.kill();
      await ended;
    },
  };
}

test('our client does to an export of qemu-nbd what it is told', async () => {
  const sizeBytes = 4 * MiB;
  for (const format of ['raw', 'qcow2']) {
    execFileSync('qemu-img', ['create', '-q', '-f', format, at('disk'), String(sizeBytes)]);
    const wanted = Buffer.alloc(sizeBytes);
    {
      await using _qemu = await qemuNbd(at('disk'), format);
      await using client = await connectNbd({ path: socket, exportName: 'disk' });
      assert.deepEqual([client.sizeBytes, client.info.hasAllocation], [sizeBytes, true]);
      const place = {
        offset: fc.nat({ max: sizeBytes - 1 }),
        lengthBytes: fc.integer({ min: 1, max: 300_000 }),
      };
      const action = fc.record({ kind: fc.constantFrom('write', 'zero', 'read'), ...place });
      await fc.assert(
        fc.asyncProperty(action, async ({ kind, offset, lengthBytes }) => {
          const end = Math.min(sizeBytes, offset + lengthBytes);
          if (kind === 'write') {
            wanted.fill((offset % 250) + 1, offset, end);
            await client.write(offset, wanted.subarray(offset, end));
          } else if (kind === 'zero') {
            wanted.fill(0, offset, end);
            await client.writeZeroes(offset, end - offset);
          } else assert.ok((await client.read(offset, end - offset)).equals(wanted.subarray(offset, end)));
        }),
      );
      await client.trim(0, 65_536);
      await client.write(0, wanted.subarray(0, 65_536));
      await client.flush();
      await holdsZeroesWhereItSays(client, wanted);
    }
    execFileSync('qemu-img', ['convert', '-f', format, '-O', 'raw', at('disk'), at('out.raw')]);
    assert.ok((await readFile(at('out.raw'))).equals(wanted), format);
  }
});

async function holdsZeroesWhereItSays(client: NbdClient, wanted: Buffer): Promise<void> {
  for (let offset = 0; offset < wanted.length; ) {
    for (const { lengthBytes, flags } of await client.extents(offset, wanted.length - offset)) {
      if ((flags & 2) !== 0)
        assert.ok(wanted.subarray(offset, offset + lengthBytes).every((byte) => byte === 0));
      offset += lengthBytes;
    }
  }
}

test('a real QEMU mirrors a disk that is being written to into our server, which hands it on to qemu-nbd', async () => {
  await using workshop = await Workshop.open();
  const plan = await workshop.plan();
  execFileSync('qemu-io', [
    '-f',
    'qcow2',
    '-c',
    'write -P 0xaa 1M 20M',
    '-c',
    'write -z 5M 1M',
    plan.diskFile,
  ]);
  execFileSync('qemu-img', ['create', '-q', '-f', 'qcow2', at('target'), '64M']);
  const machine = await Machine.launch(plan);
  // As the guest would: through the device, which stands above the mirror. It prints what went wrong.
  const write = async (command: string) => {
    const line = `qemu-io -d /machine/peripheral/disk0/virtio-backend "${command}"`;
    const said = await machine.qmp.execute('human-monitor-command', { 'command-line': line });
    assert.doesNotMatch(said, /error|conflict|failed|not found/i);
  };
  {
    await using _qemu = await qemuNbd(at('target'), 'qcow2');
    await using target = await connectNbd({ path: socket, exportName: 'disk' });
    const door = at('door.sock');
    let wroteBytes = 0;
    await using _server = await serveNbd({
      path: door,
      exportName,
      backend: {
        sizeBytes: target.sizeBytes,
        read: (offset, lengthBytes) => target.read(offset, lengthBytes),
        write: async (offset, bytes) => {
          wroteBytes += bytes.length;
          await target.write(offset, bytes);
        },
        writeZeroes: (offset, lengthBytes) => target.writeZeroes(offset, lengthBytes),
        trim: (offset, lengthBytes) => target.trim(offset, lengthBytes),
        flush: () => target.flush(),
        extents: (offset, lengthBytes) => target.extents(offset, lengthBytes),
      },
    });
    await startMirror(machine.qmp, { socketPath: door, speedBytesPerSecond: 0 });
    await write('write -P 0xbb 30M 3M');
    await waitUntilMirrored(machine.qmp, { signal, onProgress: () => {} });
    await write('write -P 0xcc 2M 64k');
    await write('discard 10M 2M');
    assert.match(JSON.stringify(await machine.qmp.execute('query-block-jobs')), new RegExp(mirrorJob));
    await finishMirror(machine.qmp, signal);
    assert.ok(wroteBytes >= 19 * MiB && wroteBytes < 40 * MiB, `${wroteBytes} bytes of data came`);
  }
  await machine.kill();
  execFileSync('qemu-img', ['compare', '-f', 'qcow2', '-F', 'qcow2', plan.diskFile, at('target')]);
  execFileSync('qemu-img', ['convert', '-f', 'qcow2', '-O', 'raw', at('target'), at('out.raw')]);
  const copy = await readFile(at('out.raw'));
  assert.deepEqual([copy[MiB], copy[2 * MiB], copy[30 * MiB], copy[5 * MiB]], [0xaa, 0xcc, 0xbb, 0]);
});
