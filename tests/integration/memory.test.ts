/** Memory and disk of a running guest, captured at one moment and brought to life in a second QEMU. */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { once } from 'node:events';
import { existsSync } from 'node:fs';
import { open, readFile, rm, stat, symlink, writeFile } from 'node:fs/promises';
import { type AddressInfo, createServer } from 'node:net';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { AppError } from '../../src/model/errors.ts';
import type { Launch } from '../../src/vm/argv.ts';
import { backupDisk, type DiskBackup } from '../../src/vm/backup.ts';
import { changeIdentity, renewLeases } from '../../src/vm/identity.ts';
import { setLinks } from '../../src/vm/links.ts';
import { Machine } from '../../src/vm/machine.ts';
import { captureMemory, listenForMemory } from '../../src/vm/memory.ts';
import { captureMemoryToFile, loadMemoryFromFile } from '../../src/vm/memory-file.ts';
import { sh, testMac, tinySpec, until, Workshop } from './tiny-vm.ts';

const options = { timeout: 180_000 };
/** A sector of the disk behind the guest's partitions. */
const counterSector = 1_000_000;
let workshop: Workshop;
let source: Machine;
before(async () => {
  workshop = await Workshop.open();
  source = await workshop.boot();
  // On the disk first, then in memory, as fast as it can: whoever captures the two at different moments is found out.
  await writeCounter(source);
}, options);
after(() => workshop[Symbol.asyncDispose]());

async function writeCounter(machine: Machine): Promise<void> {
  const loop = `
    disk=$(ls /dev/vda)
    i=0
    while :; do
      i=$((i + 1))
      printf 'on-the-disk=%08d.' $i | dd of=$disk seek=${counterSector} conv=notrunc,fsync 2>/dev/null
      printf 'in-the-memory=%08d.' $i > /run/counter
      [ ! -e /run/slowly ] || sleep 0.2
    done`;
  await machine.agent.exec({
    argv: ['/bin/sh', '-c', 'cat > /run/writer; (sh /run/writer) > /dev/null 2>&1 < /dev/null &'],
    input: loop,
    timeoutMs: 60_000,
  });
  await until(
    () => sh(machine, 'cat /run/counter 2>/dev/null || true'),
    (text) => text > 'in-the-memory=00000003',
  );
}

/** Nothing of a capture is in QEMU: no capability, no job, no node of a copy; and the guest goes on. */
async function assertUntouched(machine: Machine): Promise<void> {
  const capabilities = await machine.qmp.execute('query-migrate-capabilities');
  assert.deepEqual(
    capabilities.filter(({ capability, state }) => capability === 'background-snapshot' && state),
    [],
  );
  assert.deepEqual(await machine.qmp.execute('query-jobs'), []);
  const nodes = await machine.qmp.execute('query-named-block-nodes', { flat: true });
  assert.deepEqual(
    nodes.filter((node) => node['node-name']?.startsWith('b-')),
    [],
  );
  assert.equal((await machine.status()).running, true);
  const before = await sh(machine, 'cat /run/counter');
  await until(
    () => sh(machine, 'cat /run/counter'),
    (now) => now !== before,
  );
}

/** Disk and memory of the source into a file and into the disk of `target`. */
async function captureInto(target: Launch, file: string, compress = false) {
  let copy: DiskBackup | undefined;
  const captured = await captureMemoryToFile(source, {
    file,
    compress,
    whenStopped: async () => {
      copy = await backupDisk(source, { targetFile: target.diskFile });
    },
  });
  await copy!.done;
  return captured;
}

/** Whether the guest gets a connection to this machine through its user network. */
async function reachesHost(machine: Machine): Promise<boolean> {
  const server = createServer((socket) => void socket.on('error', () => {}).end('hello\n'));
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = server.address() as AddressInfo;
  try {
    const answer = await sh(machine, `timeout 3 nc 10.0.2.2 ${port} < /dev/null || true`);
    return answer === 'hello';
  } finally {
    server.close();
  }
}

const largestNumber = (text: string, pattern: RegExp): number =>
  Math.max(...Array.from(text.matchAll(pattern), ([, digits]) => Number(digits)));

test('memory and disk are of one moment, and the original goes on', options, async (t) => {
  const target = await workshop.plan({ image: 'tiny', incoming: true });
  const file = join(workshop.directory, 'memory');
  const captured = await captureInto(target, file);
  t.diagnostic(
    `pause ${captured.pauseMs.toFixed(0)} ms, ${captured.fileBytes} bytes in ${captured.totalMs.toFixed(0)} ms`,
  );
  await assertUntouched(source);

  const disk = join(workshop.directory, 'disk.raw');
  execFileSync('qemu-img', ['convert', '-O', 'raw', target.diskFile, disk]);
  await using handle = await open(disk, 'r');
  const { buffer } = await handle.read(Buffer.alloc(512), 0, 512, counterSector * 512);
  const onTheDisk = largestNumber(buffer.toString('latin1'), /on-the-disk=(\d{8})\./g);

  const machine = await Machine.launch(target);
  await loadMemoryFromFile(machine, { file });
  assert.deepEqual(await machine.status(), { running: false, state: 'paused' });
  const image = join(workshop.directory, 'ram');
  await machine.qmp.execute('pmemsave', { val: 0, size: tinySpec.memoryBytes, filename: image });
  const inTheMemory = largestNumber((await readFile(image)).toString('latin1'), /in-the-memory=(\d{8})\./g);
  await rm(image);
  assert.ok(onTheDisk > 3);
  assert.ok([0, 1].includes(onTheDisk - inTheMemory), `disk ${onTheDisk}, memory ${inTheMemory}`);
  await machine.kill();
  // The other tests only want to see that it counts.
  await sh(source, 'touch /run/slowly');
});

test('a loaded VM goes on where the other was, and gets an identity of its own', options, async () => {
  for (const compress of [false, true]) {
    const target = await workshop.plan({ image: 'tiny', incoming: true });
    const file = join(workshop.directory, `memory-${compress}`);
    await sh(source, 'echo one-of-a-kind > /run/token');
    const ticks = Number(await sh(source, 'cat /run/ticks'));
    await captureInto(target, file, compress);
    const machine = await Machine.launch(target);
    await setLinks(machine, false);
    await loadMemoryFromFile(machine, { file });
    await machine.resume();
    await machine.agent.waitUntilReady({ timeoutMs: 60_000 });
    // The same question is answered with yes by the original, whose cables are in.
    assert.deepEqual([await reachesHost(machine), await reachesHost(source)], [false, true]);
    assert.equal(await sh(machine, 'cat /run/token'), 'one-of-a-kind');
    assert.ok(Number(await sh(machine, 'cat /run/ticks')) >= ticks);
    assert.equal((await machine.agent.facts()).hostname, 'tiny');

    const mac = '02:00:00:00:00:99';
    const machineId = 'abcdef0123456789abcdef0123456789';
    await changeIdentity(machine.agent, { hostname: 'clone', machineId, macs: [{ from: testMac, to: mac }] });
    await setLinks(machine, true);
    await renewLeases(machine.agent);
    assert.equal(await sh(machine, 'cat /etc/machine-id'), machineId);
    const facts = await until(
      () => machine.agent.facts(),
      ({ interfaces }) =>
        interfaces?.some(
          (item) => item.mac === mac && item.addresses.some(({ address }) => /^10\./.test(address)),
        ) ?? false,
    );
    assert.equal(facts.hostname, 'clone');
    await until(
      () => reachesHost(machine),
      (reaches) => reaches,
    );
    await assert.rejects(
      changeIdentity(machine.agent, { hostname: 'clone', machineId, macs: [{ from: testMac, to: mac }] }),
      { code: 'qemu_failed', message: /no interface has the address/ },
    );
    const exit = await machine.stop({ graceMs: 60_000 });
    assert.equal(exit.reason, 'shutdown', exit.detail);
  }
  await assertUntouched(source);
});

test('memory goes straight into another QEMU that waits for it', options, async () => {
  const target = await workshop.plan({ image: 'tiny', incoming: true });
  const machine = await Machine.launch(target);
  const { socketPath, loaded } = await listenForMemory(machine);
  let copy: DiskBackup | undefined;
  await captureMemory(source, {
    socketPath,
    whenStopped: async () => {
      copy = await backupDisk(source, { targetFile: target.diskFile });
    },
  });
  await Promise.all([loaded, copy!.done]);
  assert.equal((await machine.status()).state, 'paused');
  await machine.kill();
  await assertUntouched(source);
});

test('a VM that was paused stays paused through its capture', options, async () => {
  await source.pause();
  const file = join(workshop.directory, 'paused');
  const captured = await captureMemoryToFile(source, { file, whenStopped: async () => {} });
  assert.equal(captured.pauseMs, 0);
  assert.deepEqual(await source.status(), { running: false, state: 'paused' });
  await source.resume();
  await assertUntouched(source);
});

test('a capture that fails leaves the VM running and nothing behind', options, async () => {
  const file = join(workshop.directory, 'failed');
  const nobody = join(workshop.directory, 'nobody.sock');
  await assert.rejects(captureMemory(source, { socketPath: nobody, whenStopped: async () => {} }), {
    code: 'qemu_failed',
  });
  await assertUntouched(source);
  const refusal = new AppError('insufficient_space', 'no room');
  await assert.rejects(
    captureMemoryToFile(source, { file, whenStopped: () => Promise.reject(refusal) }),
    refusal,
  );
  await assertUntouched(source);
  await symlink('/dev/full', `${file}.partial`);
  await assert.rejects(captureMemoryToFile(source, { file, whenStopped: async () => {} }), {
    code: 'insufficient_space',
  });
  await assertUntouched(source);
  assert.equal(existsSync(file), false);
  assert.equal(existsSync(`${file}.partial`), false);
});

test(
  'a capture whose reader hangs or goes away, and one that is aborted, leave the VM running',
  options,
  async (t) => {
    const { major, minor } = source.qmp.version;
    if (major < 8 || (major === 8 && minor < 1)) return t.skip('QEMU before 8.1 hangs, see memory.ts');
    const socketPath = join(workshop.directory, 'reader.sock');
    for (const goesAway of [false, true]) {
      const abort = new AbortController();
      const server = createServer((socket) => {
        socket.on('error', () => {});
        socket.once('data', () => {
          socket.pause();
          if (goesAway) socket.destroy();
          else abort.abort();
        });
      });
      await rm(socketPath, { force: true });
      server.listen(socketPath);
      await once(server, 'listening');
      const target = await workshop.plan({ image: 'tiny' });
      let copy: DiskBackup | undefined;
      const capture = captureMemory(source, {
        socketPath,
        signal: abort.signal,
        whenStopped: async () => {
          copy = await backupDisk(source, { targetFile: target.diskFile });
        },
      });
      await assert.rejects(capture, { code: goesAway ? 'qemu_failed' : 'cancelled' });
      await copy!.cancel();
      server.close();
      await assertUntouched(source);
    }
  },
);

test(
  'a capture to a file that is aborted on its way leaves the VM running and no file',
  options,
  async () => {
    const file = join(workshop.directory, 'aborted');
    const abort = new AbortController();
    const unsubscribe = source.onStatus(({ running }) => running && abort.abort());
    await assert.rejects(
      captureMemoryToFile(source, { file, signal: abort.signal, whenStopped: async () => {} }),
      { code: 'cancelled' },
    );
    unsubscribe();
    await assertUntouched(source);
    assert.equal(existsSync(file), false);
    assert.equal(existsSync(`${file}.partial`), false);
  },
);

test('a copy of the disk that cannot be made or is cancelled leaves nothing behind', options, async () => {
  await assert.rejects(backupDisk(source, { targetFile: '/nonexistent.qcow2' }), { code: 'qemu_failed' });
  const { diskFile } = await workshop.plan({ image: 'tiny' });
  await assert.rejects(backupDisk(source, { targetFile: diskFile, node: 'none' }), { code: 'qemu_failed' });
  await assertUntouched(source);
  const copy = await backupDisk(source, { targetFile: diskFile });
  await copy.cancel();
  await assertUntouched(source);
});

test(
  'what is not the memory of this VM is refused, and the QEMU that waited for it is gone',
  options,
  async () => {
    const file = join(workshop.directory, 'memory-false');
    const whole = await readFile(file);
    const damaged = join(workshop.directory, 'damaged');
    const cases: [string, Buffer, string][] = [
      ['garbage', Buffer.from('what is this'), 'image_corrupt'],
      ['empty', Buffer.alloc(0), 'image_corrupt'],
      ['cut', whole.subarray(0, (await stat(file)).size / 2), 'qemu_failed'],
      [
        'flipped',
        Buffer.concat([whole.subarray(0, 5), Buffer.alloc(100, 0xff), whole.subarray(105)]),
        'qemu_failed',
      ],
    ];
    for (const [name, bytes, code] of cases) {
      await writeFile(damaged, bytes);
      const machine = await Machine.launch(await workshop.plan({ image: 'tiny', incoming: true }));
      await assert.rejects(loadMemoryFromFile(machine, { file: damaged }), { code }, name);
      await machine.kill();
    }
  },
);

test('a load that is aborted ends, and so does a wait for memory that never comes', options, async () => {
  const machine = await Machine.launch(await workshop.plan({ image: 'tiny', incoming: true }));
  const { loaded } = await listenForMemory(machine, { timeoutMs: 200 });
  await assert.rejects(loaded, { code: 'timeout' });
  await machine.kill();
  const other = await Machine.launch(await workshop.plan({ image: 'tiny', incoming: true }));
  const file = join(workshop.directory, 'memory-false');
  await assert.rejects(loadMemoryFromFile(other, { file, signal: AbortSignal.timeout(30) }), {
    code: 'cancelled',
  });
  await other.kill();
});
