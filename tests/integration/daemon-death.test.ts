/** Daemons and QEMUs that die, hang, or find no room: guests outlive it, and nothing half-made is left. */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { chmod, mkdir, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { DatabaseSync } from 'node:sqlite';
import { after, before, test } from 'node:test';
import type { LabCloudlet, LabFleet } from '../../src/lab/fleet.ts';
import { MiB } from '../../src/model/units.ts';
import type { NodeViper, Operation, ViperEvent, Vm } from '../../src/sdk/node.ts';
import { findQemu } from '../../src/vm/process.ts';
import {
  assertGone,
  assertWhole,
  directoryOf,
  done,
  EventRecorder,
  importEmpty,
  importTiny,
  openFleet,
  refused,
  runViper,
  sh,
  ticks,
  until,
  untilTicksPass,
} from './lab-vm.ts';

const options = { timeout: 600_000 };
const guests = ['one', 'two', 'three'];
let fleet: LabFleet;
let north: LabCloudlet;
let viper: NodeViper;
let recorder: EventRecorder;

before(async () => {
  fleet = await openFleet();
  north = await fleet.add('north');
  ({ viper } = north);
  recorder = new EventRecorder(viper);
  await importTiny(viper);
  await importEmpty(viper);
  await viper.wait(
    await viper.createSnapshot({ body: { name: 'golden', image: 'tiny', instanceType: 'tiny' } }),
  );
  for (const name of guests) await create({ name, snapshot: 'golden' });
});
after(async () => {
  await recorder?.[Symbol.asyncDispose]();
  await fleet?.[Symbol.asyncDispose]();
});

const create = (body: { name: string; image?: string; snapshot?: string; start?: boolean }) =>
  done(viper, viper.createVm({ body }));
const view = (vm: string): Promise<Vm> => viper.getVm({ params: { vm } });
const remove = (vm: string) => done(viper, viper.deleteVm({ params: { vm }, query: { force: true } }));

const forceStop = (vm: string) => done(viper, viper.stopVm({ params: { vm }, body: { force: true } }));

async function killDaemon(): Promise<void> {
  await north.stop('SIGKILL');
}

// --- the daemon dies

test('three guests outlive a daemon that is killed, and the next one takes them over', options, async () => {
  await done(viper, viper.pauseVm({ params: { vm: 'three' } }));
  const before = await Promise.all(guests.map(view));
  const counted = await Promise.all(['one', 'two'].map((vm) => ticks(viper, vm)));
  await killDaemon();
  for (const { id, pid } of before) assert.equal((await findQemu(id))?.pid, pid);
  await north.start();
  assert.deepEqual(await Promise.all(guests.map(view)), before);
  await done(viper, viper.resumeVm({ params: { vm: 'three' } }));
  await untilTicksPass(viper, 'one', counted[0]!);
  await untilTicksPass(viper, 'two', counted[1]!);
  await untilTicksPass(viper, 'three', 1);
  await using session = await viper.attachConsole({ params: { vm: 'one' } });
  await sh(viper, 'one', 'echo after-the-crash > /dev/ttyS0');
  const { value } = await session.readable.getReader().read();
  assert.ok(value && value.length > 0);
  await assertWhole(north);
});

test('a guest that ended while no daemon was there is told as what it was', options, async () => {
  const { id: lastBefore } = recorder.events.at(-1)!;
  const [one, two] = [await view('one'), await view('two')];
  await sh(viper, 'two', '(sleep 1; poweroff) > /dev/null 2>&1 &');
  await killDaemon();
  process.kill(one.pid!, 'SIGKILL');
  await until('the guest to power off', async () =>
    (await readFile(path.join(directoryOf(north, two.id), 'console.log'), 'utf8')).includes('Power down'),
  );
  await north.start();
  const crashed = await until(
    'the crash',
    () => view('one'),
    ({ state }) => state === 'crashed',
  );
  assert.deepEqual([crashed.lastExit?.reason, crashed.pid], ['crashed', undefined]);
  const off = await until(
    'the end of two',
    () => view('two'),
    ({ state }) => state === 'stopped',
  );
  assert.equal(off.lastExit?.reason, 'shutdown');
  const event = await recorder.first(
    'the event of the crash',
    ({ id, kind, vmId }) => id > lastBefore && kind === 'vm.crashed' && vmId === one.id,
  );
  assert.deepEqual(event.data, { name: 'one', exit: crashed.lastExit });
  await assertWhole(north);
  await done(viper, viper.startVm({ params: { vm: 'one' } }));
  assert.equal((await view('one')).state, 'running');
});

test('a QEMU that dies while the daemon runs is a crash, told by an event', options, async () => {
  const { id, pid } = await view('one');
  const { id: lastBefore } = recorder.events.at(-1)!;
  process.kill(pid!, 'SIGKILL');
  const event = await recorder.first(
    'the event of the crash',
    (each) => each.id > lastBefore && each.kind === 'vm.crashed' && each.vmId === id,
  );
  assert.deepEqual(event.data, { name: 'one', exit: (await view('one')).lastExit });
  await assertWhole(north);
});

test('a QEMU that hangs keeps neither the daemon nor other guests from going on', options, async () => {
  const { pid } = await view('three');
  await killDaemon();
  process.kill(pid!, 'SIGSTOP');
  await north.start();
  await refused(viper.pauseVm({ params: { vm: 'three' } }), 'qemu_failed');
  await refused(viper.getGuest({ params: { vm: 'three' } }), 'qemu_failed');
  const id = await create({ name: 'beside', image: 'empty' });
  await remove('beside');
  await assertGone(north, id);
  process.kill(pid!, 'SIGCONT');
  await until('the guest', () => viper.getGuest({ params: { vm: 'three' } }));
  assert.deepEqual([(await view('three')).pid, (await view('three')).state], [pid, 'running']);
});

// --- the daemon dies in the middle

interface Death {
  when: string;
  ask: () => Promise<Operation>;
  /** The event after which the daemon is killed. */
  at: (event: ViperEvent) => boolean;
  /** What the next daemon makes of it, beside that all is whole. */
  expect: (operation: Operation) => Promise<void>;
}

const phase = (event: ViperEvent): string | undefined =>
  (event.data.operation as Operation | undefined)?.progress?.phase;
/** It was made to its end before the daemon died, or there is nothing of it. */
const wholeOrGone = async ({ subject }: Operation): Promise<void> => {
  const vm = await view(subject.vmId!).catch(() => undefined);
  if (vm) assert.equal(vm.state, 'running');
  else await assertGone(north, subject.vmId!);
};
const interrupted = ({ state, error }: Operation): void =>
  assert.deepEqual([state, error?.code], ['failed', 'interrupted']);

const deaths: Death[] = [
  {
    when: 'a VM is created, before its disk is made',
    ask: () => viper.createVm({ body: { name: 'made', image: 'empty' } }),
    at: ({ kind }) => kind === 'vm.creating',
    expect: wholeOrGone,
  },
  {
    when: 'a VM is created, while its QEMU starts',
    ask: () => viper.createVm({ body: { name: 'made', image: 'empty' } }),
    at: (event) => phase(event) === 'start',
    expect: wholeOrGone,
  },
  {
    when: 'a VM starts from a golden snapshot',
    ask: () => viper.createVm({ body: { name: 'made', snapshot: 'golden' } }),
    at: (event) => phase(event) === 'start',
    expect: wholeOrGone,
  },
  {
    when: 'a VM that rests is started',
    ask: () => viper.startVm({ params: { vm: 'resting' } }),
    at: ({ kind }) => kind === 'vm.starting',
    expect: async () => {
      const { state } = await view('resting');
      assert.ok(state === 'stopped' || state === 'running', state);
    },
  },
  {
    when: 'a VM that does not listen is stopped',
    ask: async () => {
      if ((await view('resting')).state === 'stopped')
        await done(viper, viper.startVm({ params: { vm: 'resting' } }));
      return viper.stopVm({ params: { vm: 'resting' }, body: { graceMs: 600_000 } });
    },
    at: ({ kind }) => kind === 'vm.stopping',
    expect: async (operation) => {
      interrupted(operation);
      assert.equal((await view('resting')).state, 'running');
    },
  },
  {
    when: 'a running VM is captured for its clone',
    ask: () => viper.cloneVm({ params: { vm: 'three' }, body: { name: 'made' } }),
    at: (event) => phase(event) === 'capture',
    expect: async (operation) => {
      interrupted(operation);
      await assertGone(north, operation.subject.vmId!);
      await goesOn('three');
    },
  },
  {
    when: 'the clone of a running VM starts',
    ask: () => viper.cloneVm({ params: { vm: 'three' }, body: { name: 'made' } }),
    at: (event) => phase(event) === 'start',
    expect: async (operation) => {
      interrupted(operation);
      await assertGone(north, operation.subject.vmId!);
      await goesOn('three');
    },
  },
  {
    when: 'the guest of a golden snapshot boots',
    ask: () => viper.createSnapshot({ body: { name: 'never', image: 'empty' } }),
    at: (event) => phase(event) === 'boot',
    expect: async (operation) => {
      interrupted(operation);
      await refused(viper.getSnapshot({ params: { snapshot: 'never' } }), 'not_found');
    },
  },
  {
    when: 'a VM that runs is deleted',
    ask: () => viper.deleteVm({ params: { vm: 'two' }, query: { force: true } }),
    at: ({ kind }) => kind === 'vm.deleting',
    expect: ({ subject }) => assertGone(north, subject.vmId!),
  },
];

/** The guest is not paused for good by a capture that nobody ends any more, and can be captured again. */
async function goesOn(vm: string): Promise<void> {
  const { state } = await view(vm);
  if (state === 'paused') await done(viper, viper.resumeVm({ params: { vm } }));
  await untilTicksPass(viper, vm, await ticks(viper, vm));
}

test('a daemon that is killed in the middle of its work leaves nothing half-made', options, async (t) => {
  await create({ name: 'resting', image: 'empty', start: false });
  await done(viper, viper.startVm({ params: { vm: 'two' } }));
  for (const { when, ask, at, expect } of deaths) {
    await t.test(when, options, async () => {
      // A daemon asks QEMU what it can do when it first wants to know; the QEMU that is asked would outlive it.
      await viper.getCloudlet();
      const { id: lastBefore } = recorder.events.at(-1)!;
      const [{ id }] = await Promise.all([
        ask(),
        recorder.first(when, (event) => event.id > lastBefore && at(event)),
      ]);
      await killDaemon();
      await north.start();
      await assertWhole(north);
      const operation = await viper.getOperation({ params: { operation: id } });
      if (operation.state !== 'succeeded') interrupted(operation);
      await expect(operation);
      if (await view('made').catch(() => undefined)) await remove('made');
    });
  }
});

test('an upload that the daemon does not survive leaves nothing of the image', options, async () => {
  const started = Promise.withResolvers<void>();
  const body = new ReadableStream<Uint8Array>({
    start: (controller) => controller.enqueue(new Uint8Array(4 * MiB).fill(1)),
    // Asked for more once the first chunk is on its way; more never comes.
    pull: () => started.resolve(),
  });
  const failed = refused(viper.importImage({ body, query: { alias: 'half' } }), 'unreachable');
  const staging = path.join(north.directory, 'images', 'tmp');
  await Promise.race([started.promise, failed]);
  await until('the upload', async () => (await readdir(staging)).length === 1);
  await killDaemon();
  await failed;
  await north.start();
  await assertWhole(north);
  await refused(viper.getImage({ params: { image: 'half' } }), 'not_found');
});

// --- state directories that no daemon may touch

const serve = (directory: string) => runViper('serve', '--state', directory, '--listen', '127.0.0.1:0');

test('a second daemon on the same state refuses, and the first is unharmed', options, async () => {
  const { code, stderr } = await serve(north.directory);
  assert.equal(code, 1);
  assert.match(stderr, /^viper: .*another daemon holds it/m);
  await untilTicksPass(viper, 'three', await ticks(viper, 'three'));
  await assertWhole(north);
});

test(
  'a directory that was never initialised, or by a newer Viper, is refused and left alone',
  options,
  async () => {
    const nothing = path.join(fleet.root, 'nothing');
    assert.match((await serve(nothing)).stderr, /^viper: .*holds no cloudlet/m);
    assert.equal(existsSync(nothing), false);

    const newer = path.join(fleet.root, 'newer');
    await runViper('init', '--state', newer, '--name', 'newer');
    const file = path.join(newer, 'state.sqlite');
    const database = new DatabaseSync(file);
    database.exec('PRAGMA user_version = 4711');
    database.close();
    const before = await readFile(file);
    assert.match((await serve(newer)).stderr, /^viper: .*4711/m);
    assert.deepEqual(await readFile(file), before);
  },
);

test('a config with a setting that is unknown or bad is refused by its name', options, async () => {
  const file = path.join(fleet.root, 'newer', 'config.json');
  await writeFile(file, '{"listen":"127.0.0.1:0","reserveBytes":-1}');
  const { code, stderr } = await serve(path.dirname(file));
  assert.equal(code, 2);
  assert.match(stderr, /reserveBytes/);
});

test('a daemon that cannot listen where it is told to says so, and ends', options, async () => {
  const directory = path.join(fleet.root, 'third');
  await runViper('init', '--state', directory, '--name', 'third');
  const taken = new URL(north.url).host;
  const { code, stderr } = await runViper('serve', '--state', directory, '--listen', taken);
  assert.equal(code, 2);
  assert.match(stderr, new RegExp(`^viper: Cannot listen on ${taken}: another program listens there`, 'm'));
});

// --- QEMU fails

test('a QEMU that dies at its start says why, and the VM rests where it was', options, async () => {
  const bin = path.join(fleet.root, 'bin');
  const broken = path.join(bin, 'broken');
  const qemu = execFileSync('sh', ['-c', 'command -v qemu-system-x86_64'], { encoding: 'utf8' }).trim();
  await mkdir(bin);
  await writeFile(
    path.join(bin, 'qemu-system-x86_64'),
    `#!/bin/sh
case "$*" in *"-machine none"*) exec ${qemu} "$@" ;; esac
[ -e ${broken} ] || exec ${qemu} "$@"
echo "qemu-system-x86_64: not today" >&2
exit 1
`,
  );
  await chmod(path.join(bin, 'qemu-system-x86_64'), 0o755);
  const { PATH } = process.env;
  try {
    process.env.PATH = `${bin}:${PATH}`;
    await north.stop();
    await north.start();
    await writeFile(broken, '');
    if ((await view('resting')).state === 'running') await forceStop('resting');
    for (let attempt = 0; attempt < 2; attempt += 1) {
      const { details } = await refused(
        done(viper, viper.startVm({ params: { vm: 'resting' } })),
        'qemu_failed',
      );
      assert.match(String(details.output), /not today/);
      const { state, pid, allowedActions } = await view('resting');
      assert.deepEqual([state, pid], ['stopped', undefined]);
      assert.ok(allowedActions.includes('start'));
    }
    const asked = await viper.createVm({ body: { name: 'never', image: 'empty' } });
    await refused(viper.wait(asked), 'qemu_failed');
    await assertGone(north, asked.subject.vmId!);
    await rm(broken);
    await done(viper, viper.startVm({ params: { vm: 'resting' } }));
    assert.equal((await view('resting')).state, 'running');
  } finally {
    process.env.PATH = PATH;
    await north.stop();
    await north.start();
  }
});

test(
  'a guest without an agent is told so in bounded time, and nothing waits behind it',
  options,
  async () => {
    assert.equal((await view('resting')).state, 'running');
    const params = { vm: 'resting' };
    await Promise.all([
      refused(viper.getGuest({ params }), 'agent_unavailable'),
      refused(viper.execInGuest({ params, body: { argv: ['true'] } }), 'agent_unavailable'),
      refused(viper.cloneVm({ params, body: { name: 'never' } }), 'agent_unavailable'),
    ]);
    await refused(view('never'), 'not_found');
    const snapshot = { name: 'never', image: 'empty', readyTimeoutMs: 1000 };
    await refused(done(viper, viper.createSnapshot({ body: snapshot })), 'agent_unavailable');
    // A clone that keeps its identity needs no agent.
    await done(viper, viper.cloneVm({ params, body: { name: 'twin', identity: 'keep' } }));
    assert.deepEqual((await view('twin')).spec, (await view('resting')).spec);
    await done(viper, viper.stopVm({ params, body: { graceMs: 100 } }));
    assert.equal((await view('resting')).lastExit?.reason, 'forced');
    await assertWhole(north);
  },
);
