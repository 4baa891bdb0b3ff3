/** A real QEMU from its launch to its end, with an empty disk: nothing in here needs a guest. */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync } from 'node:fs';
import { readdir, readFile, readlink, writeFile } from 'node:fs/promises';
import { createServer, type Socket } from 'node:net';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { after, before, test } from 'node:test';
import { AppError } from '../../src/model/errors.ts';
import { newId } from '../../src/model/ids.ts';
import type { ProcessRef } from '../../src/model/vm.ts';
import type { Launch } from '../../src/vm/argv.ts';
import { Host } from '../../src/vm/host.ts';
import { Machine } from '../../src/vm/machine.ts';
import { pipePaths, socketPaths } from '../../src/vm/paths.ts';
import { findQemu, isAlive } from '../../src/vm/process.ts';
import { SpareMonitor } from '../../src/vm/spare-monitor.ts';
import { until, Workshop } from './tiny-vm.ts';

const options = { timeout: 120_000 };
let workshop: Workshop;
before(async () => {
  workshop = await Workshop.open();
});
after(() => workshop[Symbol.asyncDispose]());

async function assertNothingLeft(launch: Launch): Promise<void> {
  assert.equal(await findQemu(launch.id), null);
  const names = await readdir(launch.directory);
  assert.deepEqual(
    names.filter((name) => name.endsWith('.sock')),
    [],
  );
}

test(
  'a launched VM is paused until it is told to run, and tells when it stops and runs',
  options,
  async () => {
    const machine = await Machine.launch(await workshop.plan());
    assert.deepEqual(await machine.status(), { running: false, state: 'prelaunch' });
    const heard: boolean[] = [];
    machine.onStatus(({ running }) => heard.push(running));
    await machine.resume();
    assert.deepEqual(await machine.status(), { running: true, state: 'running' });
    await machine.pause();
    assert.deepEqual(await machine.status(), { running: false, state: 'paused' });
    assert.deepEqual(heard, [true, false]);
    await machine.kill();
  },
);

test('a kill is an end by force, and leaves no process and no socket', options, async () => {
  const launch = await workshop.plan();
  const machine = await Machine.launch(launch);
  const exit = await machine.kill();
  assert.equal(exit.reason, 'forced');
  assert.deepEqual(await machine.exited, exit);
  await assertNothingLeft(launch);
});

test('a QEMU that cannot start says why, and nothing of it is left', options, async () => {
  const launch = await workshop.plan();
  await assert.rejects(Machine.launch({ ...launch, diskFile: '/nonexistent.qcow2' }), (error) => {
    assert.ok(error instanceof AppError);
    assert.equal(error.code, 'qemu_failed');
    assert.match(String(error.details.output), /\/nonexistent\.qcow2.*No such file/);
    return true;
  });
  await assertNothingLeft(launch);
  await assert.rejects(Machine.launch(launch, { qemu: '/nonexistent/qemu' }), { code: 'qemu_failed' });
});

test('an abort at any moment of the launch leaves nothing', options, async () => {
  for (const afterMs of [0, 1, 5, 20, 40]) {
    const launch = await workshop.plan();
    const signal = AbortSignal.timeout(afterMs);
    const outcome = await Machine.launch(launch, { signal }).catch((error) => error);
    if (outcome instanceof Machine) await outcome.kill();
    else assert.equal(outcome.code, 'cancelled');
    await assertNothingLeft(launch);
  }
});

test('a program that is not QEMU is killed when its monitor never answers', options, async () => {
  const launch = await workshop.plan();
  const program = join(launch.directory, 'not-qemu');
  await writeFile(program, '#!/bin/sh\nexec sleep 600\n', { mode: 0o700 });
  await assert.rejects(Machine.launch(launch, { qemu: program, timeoutMs: 200 }), { code: 'timeout' });
  await assertNothingLeft(launch);
});

test('a program that ends at once is a failure, not a wait', options, async () => {
  await assert.rejects(Machine.launch(await workshop.plan(), { qemu: '/bin/false' }), {
    code: 'qemu_failed',
  });
});

test('a directory whose sockets would have too long a name is refused', options, async () => {
  const launch = await workshop.plan();
  await assert.rejects(Machine.launch({ ...launch, directory: `/tmp/${'d'.repeat(100)}` }), {
    code: 'unsupported',
  });
});

test('QEMU survives the process that launched it, and is found again', options, async () => {
  const launch = await workshop.plan();
  const program = join(import.meta.dirname, 'launch-and-wait.ts');
  const starter = spawn(process.execPath, [program, JSON.stringify(launch)], {
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  const ended = once(starter, 'exit');
  const [line] = await Promise.race([once(createInterface(starter.stdout), 'line'), ended]);
  const found: ProcessRef = JSON.parse(line);
  starter.kill('SIGKILL');
  await ended;

  assert.deepEqual(await findQemu(launch.id), found);
  const machine = await Machine.adopt({ ...launch, process: found });
  assert.ok(machine);
  assert.deepEqual(await machine.status(), { running: true, state: 'running' });
  machine.detach();
  assert.equal(await isAlive(found), true);

  const again = await Machine.adopt({ ...launch, process: found });
  assert.equal((await again!.kill()).reason, 'forced');
  await assertNothingLeft(launch);
});

test('a QEMU that dies by itself has crashed, be it our child or adopted', options, async () => {
  for (const adopted of [false, true]) {
    const launch = await workshop.plan();
    let machine: Machine | null = await Machine.launch(launch);
    const found = machine.process;
    if (adopted) {
      machine.detach();
      machine = await Machine.adopt({ ...launch, process: found });
    }
    process.kill(found.pid, 'SIGKILL');
    const exit = await machine!.exited;
    assert.equal(exit.reason, 'crashed');
    if (!adopted) assert.match(exit.detail, /SIGKILL/);
    await assert.rejects(machine!.status(), { code: 'qemu_failed' });
    await assertNothingLeft(launch);
  }
});

test('what is gone, or was never this process, is not adopted', options, async () => {
  const launch = await workshop.plan();
  const machine = await Machine.launch(launch);
  const { pid, startTicks } = machine.process;
  const other = { pid: process.pid, startTicks: startTicks - 1 };
  const elsewhere = await workshop.plan();
  assert.equal(await Machine.adopt({ ...elsewhere, process: other }), null);
  machine.detach();
  await assert.rejects(Machine.adopt({ ...launch, id: newId(), process: { pid, startTicks } }), {
    code: 'qemu_failed',
  });
  const again = await Machine.adopt({ ...launch, process: { pid, startTicks } });
  await again!.kill();
  assert.equal(await Machine.adopt({ ...launch, process: { pid, startTicks } }), null);
});

test('a monitor that does not answer is an error, and QEMU lives on', options, async () => {
  const launch = await workshop.plan();
  const machine = await Machine.launch(launch);
  machine.detach();
  const { pid } = machine.process;
  process.kill(pid, 'SIGSTOP');
  try {
    await assert.rejects(Machine.adopt({ ...launch, process: machine.process }, { timeoutMs: 200 }), {
      code: 'timeout',
    });
    assert.equal(await isAlive(machine.process), true);
  } finally {
    process.kill(pid, 'SIGCONT');
  }
  const again = await until(
    () => Machine.adopt({ ...launch, process: machine.process }).catch(() => null),
    (found) => found !== null,
  );
  await again!.kill();
});

test('something that talks garbage where the monitor should be is an error', options, async () => {
  const launch = await workshop.plan();
  const server = createServer((socket) => void socket.on('error', () => {}).end('HTTP/1.1 200 OK\r\n'));
  server.listen(join(launch.directory, 'qmp.sock'));
  await once(server, 'listening');
  try {
    const self = { pid: process.pid, startTicks: 0 };
    const stat = await readFile('/proc/self/stat', 'utf8');
    self.startTicks = Number(stat.slice(stat.lastIndexOf(')') + 2).split(' ')[19]);
    await assert.rejects(Machine.adopt({ ...launch, process: self }), { code: 'qemu_failed' });
  } finally {
    server.close();
  }
});

test('a guest that hears nothing is ended by force after the grace', options, async () => {
  const launch = await workshop.plan();
  const machine = await Machine.launch(launch);
  await machine.resume();
  await assert.rejects(machine.agent.ping({ timeoutMs: 100 }), { code: 'agent_unavailable' });
  assert.equal((await machine.stop({ graceMs: 200 })).reason, 'forced');
  await assertNothingLeft(launch);
});

test('a stop that is aborted leaves the VM to whoever asks next', options, async () => {
  const machine = await Machine.launch(await workshop.plan());
  await machine.resume();
  await assert.rejects(machine.stop({ graceMs: 60_000, signal: AbortSignal.timeout(100) }), {
    code: 'cancelled',
  });
  assert.equal((await machine.status()).running, true);
  assert.equal((await machine.kill()).reason, 'forced');
});

test(
  'QEMU appends to the console log, so that it can be shortened, and holds no stream of ours',
  options,
  async () => {
    const launch = await workshop.plan();
    const machine = await Machine.launch(launch);
    const { pid } = machine.process;
    const files = new Map<string, string>();
    for (const fd of await readdir(`/proc/${pid}/fd`)) files.set(await readlink(`/proc/${pid}/fd/${fd}`), fd);
    const info = await readFile(`/proc/${pid}/fdinfo/${files.get(machine.paths.consoleLog)}`, 'utf8');
    const flags = Number.parseInt(/^flags:\s+(\d+)/m.exec(info)![1]!, 8);
    assert.equal(flags & 0o2000, 0o2000, 'O_APPEND');
    const standard = await Promise.all([0, 1, 2].map((fd) => readlink(`/proc/${pid}/fd/${fd}`)));
    assert.deepEqual(standard, ['/dev/null', machine.paths.qemuLog, machine.paths.qemuLog]);
    const environment = await readFile(`/proc/${pid}/environ`, 'utf8');
    assert.match(environment, /^PATH=[^\0]*\0LC_ALL=C\0$/);
    for (const path of socketPaths(machine.paths).slice(0, 3)) assert.ok(existsSync(path), path);
    await machine.kill();
  },
);

test('the facts of this host name its QEMU and versioned machine types only', options, async () => {
  const facts = await new Host().facts();
  assert.match(facts.qemu.version, /^\d+\.\d+\.\d+$/);
  assert.ok(facts.qemu.machines.some(({ name }) => name === 'pc-q35-7.2'));
  assert.ok(facts.qemu.machines.every(({ name }) => /^pc-q35-\d/.test(name)));
  assert.ok(facts.qemu.cpuModels.includes('Nehalem'));
  assert.ok(facts.memory.totalBytes >= facts.memory.availableBytes && facts.memory.availableBytes > 0);
});

test(
  'a spare monitor answers a later daemon while QEMU does nothing else, and goes with its QEMU',
  options,
  async () => {
    const launch = { ...(await workshop.plan()), incoming: true, spareMonitor: true };
    const machine = await Machine.launch(launch);
    // A server that takes the connection and never speaks: QEMU waits for it and runs no other command.
    const silentPath = join(launch.directory, 'nbd.sock');
    await using silent = createServer().listen(silentPath);
    await once(silent, 'listening');
    const reached = once(silent, 'connection');
    const server = { type: 'unix', path: silentPath };
    machine.qmp.execute('blockdev-add', { driver: 'nbd', 'node-name': 'never', server }).catch(() => {});
    const [socket] = (await reached) as [Socket];
    machine.detach();
    const { id, directory } = launch;
    const found = { id, directory, process: machine.process };
    await assert.rejects(Machine.adopt(found, { timeoutMs: 1000 }), { code: 'timeout' });
    for (const _daemon of [1, 2]) {
      using spare = SpareMonitor.open(machine.paths)!;
      await assert.rejects(spare.recover(machine.paths.incoming), /when postcopy is paused/);
    }
    socket.destroy();
    const adopted = await Machine.adopt(found);
    await adopted!.kill();
    assert.equal(SpareMonitor.open(machine.paths), undefined);
    assert.deepEqual(pipePaths(machine.paths).filter(existsSync), []);
  },
);
