/** The life of images and VMs through a real daemon, its API and its SDK, with guests that really run. */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { createHash, randomBytes } from 'node:crypto';
import { existsSync } from 'node:fs';
import { readdir, readFile } from 'node:fs/promises';
import path from 'node:path';
import { after, before, test } from 'node:test';
import { setImmediate } from 'node:timers/promises';
import type { LabCloudlet, LabFleet } from '../../src/lab/fleet.ts';
import { guestImage } from '../../src/lab/guests.ts';
import { allowedActions, type VmAction, vmActions } from '../../src/model/states.ts';
import { GiB, MiB } from '../../src/model/units.ts';
import type { ConsoleSession, CreateVm, NodeViper, Vm } from '../../src/sdk/node.ts';
import { findQemu } from '../../src/vm/process.ts';
import {
  assertGone,
  booted,
  directoryOf,
  done,
  EventRecorder,
  importEmpty,
  importTiny,
  openFleet,
  refused,
  sh,
  ticks,
  until,
  untilTicksPass,
} from './lab-vm.ts';

const options = { timeout: 600_000 };
let fleet: LabFleet;
let north: LabCloudlet;
let viper: NodeViper;
/** Sees everything that happens in this file. */
let recorder: EventRecorder;
/** Makes the golden snapshot that VMs which need no boot of their own start from; made when it is first needed. */
let golden: Promise<unknown> | undefined;

before(async () => {
  fleet = await openFleet();
  north = await fleet.add('north');
  ({ viper } = north);
  recorder = new EventRecorder(viper);
  await importTiny(viper);
  await create({ name: 'alpha' });
  await booted(viper, 'alpha');
});
after(async () => {
  await recorder?.[Symbol.asyncDispose]();
  await fleet?.[Symbol.asyncDispose]();
});

const create = (body: Omit<CreateVm, 'image' | 'instanceType'>) =>
  done(viper, viper.createVm({ body: { image: 'tiny', instanceType: 'tiny', ...body } }));
const view = (vm: string): Promise<Vm> => viper.getVm({ params: { vm } });
const start = (vm: string) => done(viper, viper.startVm({ params: { vm } }));
const stop = (vm: string, body = {}) => done(viper, viper.stopVm({ params: { vm }, body }));
const pause = (vm: string) => done(viper, viper.pauseVm({ params: { vm } }));
const resume = (vm: string) => done(viper, viper.resumeVm({ params: { vm } }));
const clone = (vm: string, name: string) => done(viper, viper.cloneVm({ params: { vm }, body: { name } }));
const remove = (vm: string) => done(viper, viper.deleteVm({ params: { vm }, query: { force: true } }));
const exec = (vm: string, body: { argv: string[]; input?: string; timeoutMs?: number }) =>
  viper.execInGuest({ params: { vm }, body });

async function startGolden(name: string): Promise<string> {
  golden ??= (async () =>
    viper.wait(
      await viper.createSnapshot({ body: { name: 'golden', image: 'tiny', instanceType: 'tiny' } }),
    ))();
  await golden;
  return done(viper, viper.createVm({ body: { name, snapshot: 'golden' } }));
}

// --- images

const sha256 = (bytes: Uint8Array): string => `sha256:${createHash('sha256').update(bytes).digest('hex')}`;

test(
  'the same bytes again are the same image, under its old alias and under a new one',
  options,
  async () => {
    const first = await viper.getImage({ params: { image: 'tiny' } });
    assert.equal(first.digest, sha256(await readFile(guestImage('tiny'))));
    assert.deepEqual(await importTiny(viper, 'tiny'), first);
    const again = await importTiny(viper, 'tiny-too');
    assert.deepEqual(again, { ...first, aliases: ['tiny', 'tiny-too'] });
    assert.deepEqual((await viper.listImages()).items, [again]);
    await viper.removeImageAlias({ params: { image: 'tiny', alias: 'tiny-too' } });
    await refused(viper.getImage({ params: { image: 'tiny-too' } }), 'not_found');
  },
);

test(
  'an image that is not whole, not a disk or not the announced one is refused, and nothing of it stays',
  options,
  async () => {
    const whole = await readFile(guestImage('tiny'));
    const garbage = randomBytes(2 * MiB);
    const attempt = (bytes: Uint8Array, query: object) =>
      viper.importImage({ body: new Blob([Uint8Array.from(bytes)]), query: { alias: 'bad', ...query } });
    await refused(attempt(whole, { digest: sha256(garbage) }), 'digest_mismatch');
    await refused(attempt(whole.subarray(0, whole.length / 2), {}), 'image_corrupt');
    await refused(attempt(garbage, {}), 'image_corrupt');
    await refused(attempt(garbage, { format: 'qcow2' }), 'image_corrupt');
    await refused(attempt(whole, { format: 'raw' }), 'image_corrupt');
    await refused(attempt(new Uint8Array(), {}), 'image_corrupt');
    await refused(attempt(garbage, { alias: 'tiny' }), 'name_taken');
    await refused(viper.getImage({ params: { image: 'bad' } }), 'not_found');
    assert.equal((await viper.listImages()).items.length, 1);
    const { digest } = await viper.getImage({ params: { image: 'tiny' } });
    const images = path.join(north.directory, 'images');
    assert.deepEqual((await readdir(images)).sort(), [digest.replace(':', '-'), 'tmp']);
    assert.deepEqual(await readdir(path.join(images, 'tmp')), []);
  },
);

test('an image that a VM uses cannot be removed', options, async () => {
  const { details } = await refused(viper.deleteImage({ params: { image: 'tiny' } }), 'in_use');
  assert.deepEqual(details.usedBy, [{ kind: 'vm', name: 'alpha' }]);
});

test('an image that nobody uses is removed, with its aliases and its file', options, async () => {
  const image = await importEmpty(viper);
  assert.deepEqual([image.format, image.virtualBytes], ['raw', MiB]);
  await viper.deleteImage({ params: { image: 'empty' } });
  await refused(viper.getImage({ params: { image: image.digest } }), 'not_found');
  assert.equal((await readdir(path.join(north.directory, 'images'))).length, 2);
});

// --- making VMs

test('an instance type gives the hardware, and its facts are pinned', options, async () => {
  const { spec, state, pid, runningWith } = await view('alpha');
  const facts = await viper.getCloudlet();
  assert.equal(state, 'running');
  assert.equal(runningWith, facts.accelerator);
  assert.deepEqual(await findQemu((await view('alpha')).id).then((found) => found?.pid), pid);
  assert.deepEqual([spec.cpu.count, spec.memoryBytes, spec.disk.sizeBytes], [1, 256 * MiB, GiB]);
  assert.match(spec.machine, /^pc-q35-\d+\.\d+$/);
  assert.deepEqual(
    spec.nets.map((net) => net.network),
    ['user'],
  );
});

test(
  'what the caller says of the hardware goes before the instance type, and reaches QEMU',
  options,
  async () => {
    const hardware = {
      cpu: { count: 2 },
      memoryBytes: 128 * MiB,
      diskBytes: 2 * GiB,
      nets: [{ network: 'user', mac: '02:00:00:00:00:77' }, { network: 'user' }],
    };
    const id = await create({ name: 'made', hardware, start: false });
    const made = await view('made');
    assert.deepEqual([made.state, made.pid, await findQemu(id)], ['stopped', undefined, null]);
    assert.deepEqual(
      [made.spec.cpu.count, made.spec.memoryBytes, made.spec.disk.sizeBytes, made.spec.nets[0]!.mac],
      [2, 128 * MiB, 2 * GiB, '02:00:00:00:00:77'],
    );
    await start('made');
    const argv = (await readFile(`/proc/${(await view('made')).pid}/cmdline`, 'utf8')).split('\0');
    assert.match(argv[argv.indexOf('-smp') + 1]!, /^(cpus=)?2\b/);
    assert.match(argv[argv.indexOf('-m') + 1]!, /131072K|128M/);
    for (const { mac } of made.spec.nets) assert.ok(argv.some((argument) => argument.includes(mac)));
    await remove('made');
    await assertGone(north, id);
  },
);

test('what cannot be made is refused before anything is made', options, async () => {
  const before = await viper.listVms();
  const attempt = (body: Partial<CreateVm>) =>
    viper.createVm({ body: { name: 'not-made', image: 'tiny', ...body } });
  await refused(attempt({ name: 'alpha' }), 'name_taken');
  await refused(attempt({ image: 'no-such-image' }), 'not_found');
  await refused(attempt({ instanceType: 'no-such-type' }), 'invalid_request');
  await refused(attempt({ snapshot: 'golden' }), 'invalid_request');
  await refused(attempt({ hardware: { nets: [{ network: 'no-such-network' }] } }), 'unsupported');
  await refused(attempt({ hardware: { machine: 'pc-q35-99.9' } }), 'unsupported');
  await refused(attempt({ hardware: { machine: 'q35' } }), 'unsupported');
  await refused(attempt({ hardware: { cpu: { model: 'host' } } }), 'unsupported');
  await refused(attempt({ hardware: { diskBytes: MiB } }), 'invalid_request');
  await refused(attempt({ hardware: { memoryBytes: MiB } }), 'invalid_request');
  assert.deepEqual(await viper.listVms(), before);
});

/** The codes with which the calls ended, in order; 'done' for one that went well. */
const outcomes = async (calls: Promise<unknown>[]): Promise<string[]> =>
  (await Promise.allSettled(calls))
    .map((call) => (call.status === 'fulfilled' ? 'done' : (call.reason as { code: string }).code))
    .sort();

test(
  'of many who ask for the same at once, one gets it and the others are told why not',
  options,
  async () => {
    const many = <T>(ask: () => Promise<T>) => Array.from({ length: 8 }, ask);
    const others = (code: string) => [...Array(7).fill(code), 'done'].sort();
    const body = { name: 'raced', image: 'tiny', instanceType: 'tiny', start: false };
    assert.deepEqual(await outcomes(many(() => done(viper, viper.createVm({ body })))), others('name_taken'));
    assert.deepEqual(await outcomes(many(() => viper.startVm({ params: { vm: 'raced' } }))), others('busy'));
    await until('the start', async () => (await view('raced')).state === 'running');
    const force = { params: { vm: 'raced' }, query: { force: true } };
    const deleted = await outcomes(many(() => viper.deleteVm(force)));
    assert.ok(
      deleted.includes('done') && deleted.every((each) => ['busy', 'done', 'not_found'].includes(each)),
    );
    await until('the end', () =>
      view('raced').then(
        () => false,
        () => true,
      ),
    );
  },
);

test(
  'an image that is removed while VMs are made of it is there for all of them or for none',
  options,
  async () => {
    for (let round = 0; round < 5; round += 1) {
      await importEmpty(viper);
      const names = Array.from({ length: 4 }, (_, index) => `of-empty-${index}`);
      const asked = names.map((name) =>
        done(viper, viper.createVm({ body: { name, image: 'empty', instanceType: 'tiny', start: false } })),
      );
      const [[removal], made] = await Promise.all([
        outcomes([viper.deleteImage({ params: { image: 'empty' } })]),
        outcomes(asked),
      ]);
      assert.ok(
        made.every((each) => each === (removal === 'done' ? 'not_found' : 'done')),
        `${removal}: ${made}`,
      );
      assert.ok(removal === 'done' || removal === 'in_use', removal);
      for (const name of names) if (removal !== 'done') await remove(name);
      if (removal !== 'done') await viper.deleteImage({ params: { image: 'empty' } });
    }
  },
);

// --- looking at guests

test('the guest says who it is', options, async () => {
  const { hostname, kernel, os, interfaces } = await viper.getGuest({ params: { vm: 'alpha' } });
  assert.equal(hostname, 'alpha');
  assert.ok(kernel && os?.name);
  const { spec } = await view('alpha');
  assert.ok(interfaces?.some(({ mac }) => mac === spec.nets[0]!.mac));
});

test(
  'a program in the guest gets its arguments and input, and gives its output and exit code',
  options,
  async () => {
    const reply = await exec('alpha', {
      argv: ['/bin/sh', '-c', 'cat; echo "$0" >&2; exit 3', 'a b'],
      input: 'häuschen\n',
    });
    assert.deepEqual(reply, { exitCode: 3, stdout: 'häuschen\n', stderr: 'a b\n', truncated: false });
    assert.equal((await exec('alpha', { argv: ['/no/such/program'] })).exitCode, 127);
    const long = await exec('alpha', { argv: ['/bin/sh', '-c', 'yes | head -c 3000000'] });
    assert.ok(long.truncated && long.stdout.startsWith('y\ny\n'));
  },
);

test('a program that does not end in its time is ended', options, async () => {
  await refused(exec('alpha', { argv: ['/bin/sleep', '4321'], timeoutMs: 1500 }), 'timeout');
  await until('the end of the program', async () => {
    const { exitCode } = await exec('alpha', { argv: ['/bin/sh', '-c', 'pgrep -f "sleep [4]321"'] });
    return exitCode !== 0;
  });
});

async function readUntil(session: ConsoleSession, pattern: RegExp): Promise<string> {
  const reader = session.readable.getReader();
  const decoder = new TextDecoder();
  let text = '';
  while (!pattern.test(text)) {
    const { value, done: ended } = await reader.read();
    assert.ok(!ended, `the console ended after ${JSON.stringify(text)}`);
    text += decoder.decode(value, { stream: true });
  }
  reader.releaseLock();
  return text;
}

test('the console keeps what was written, and two watchers see what one of them types', options, async () => {
  const log = await viper.getConsoleLog({ params: { vm: 'alpha' } });
  assert.match(log, /viper guest alpha ready/);
  const tail = await viper.getConsoleLog({ params: { vm: 'alpha' }, query: { tailBytes: 10 } });
  assert.ok(Buffer.byteLength(tail) <= 10);
  {
    await using typist = await viper.attachConsole({ params: { vm: 'alpha' } });
    await using watcher = await viper.attachConsole({ params: { vm: 'alpha' } });
    const writer = typist.writable.getWriter();
    await writer.write(new TextEncoder().encode('echo answer-$((6 * 7))\n'));
    writer.releaseLock();
    await Promise.all([readUntil(typist, /answer-42/), readUntil(watcher, /answer-42/)]);
    // One who leaves takes nothing from the other.
    typist.close();
    await typist.closed;
    await sh(viper, 'alpha', 'echo again-$((40 + 3)) > /dev/ttyS0');
    await readUntil(watcher, /again-43/);
  }
  assert.match(await viper.getConsoleLog({ params: { vm: 'alpha' } }), /answer-42.*again-43/s);
});

// --- running and resting

test('a paused VM rests and goes on from where it was', options, async () => {
  const before = await ticks(viper, 'alpha');
  await pause('alpha');
  assert.equal((await view('alpha')).state, 'paused');
  await refused(viper.getGuest({ params: { vm: 'alpha' } }), 'wrong_state');
  await resume('alpha');
  assert.equal((await view('alpha')).state, 'running');
  await untilTicksPass(viper, 'alpha', before);
});

test('a console whose guest takes no typing, or ends while somebody types, is closed', options, async () => {
  const type = async (session: ConsoleSession, text: string): Promise<void> => {
    const writer = session.writable.getWriter();
    const bytes = new TextEncoder().encode(text);
    const write = () =>
      writer.write(bytes).then(
        () => true,
        () => false,
      );
    while (await write()) await setImmediate();
  };
  const attach = () => viper.attachConsole({ params: { vm: 'typed-to' } });
  await create({ name: 'typed-to' });
  await pause('typed-to');
  const paused = await attach();
  await type(paused, '\n'.repeat(32 * 1024));
  const { code, reason } = await paused.closed;
  assert.deepEqual([code, /typed bytes wait/.test(reason)], [1013, true], reason);

  await resume('typed-to');
  const sessions = await Promise.all([attach(), attach(), attach()]);
  const typing = sessions.map((session) => type(session, '\n'));
  await remove('typed-to');
  await Promise.all([...typing, ...sessions.map(({ closed }) => closed)]);
  assert.equal((await viper.getHealth()).status, 'ok');
});

test(
  'a clone of a running VM goes on where the original was, as somebody else, and leaves it undisturbed',
  options,
  async () => {
    await sh(viper, 'alpha', 'echo kept > /run/mark; echo kept > /data/mark; sync');
    const identity = (vm: string) =>
      sh(viper, vm, 'hostname; cat /etc/machine-id; cat /sys/class/net/eth0/address').then((text) =>
        text.split('\n'),
      );
    const original = await view('alpha');
    const originalIdentity = await identity('alpha');
    const before = await ticks(viper, 'alpha');

    const id = await clone('alpha', 'beta');

    const beta = await view('beta');
    assert.ok((await ticks(viper, 'beta')) >= before);
    assert.deepEqual(beta.origin, { kind: 'clone', vmId: original.id });
    assert.notEqual(beta.spec.nets[0]!.mac, original.spec.nets[0]!.mac);
    assert.deepEqual(await identity('beta'), ['beta', id.replaceAll('-', ''), beta.spec.nets[0]!.mac]);
    assert.equal(await sh(viper, 'beta', 'cat /run/mark /data/mark'), 'kept\nkept');

    assert.deepEqual(await view('alpha'), original);
    assert.deepEqual(await identity('alpha'), originalIdentity);
    await sh(viper, 'beta', 'echo other > /data/mark; sync');
    assert.equal(await sh(viper, 'alpha', 'cat /data/mark'), 'kept');
    const [one, other] = await Promise.all([ticks(viper, 'alpha'), ticks(viper, 'beta')]);
    await Promise.all([untilTicksPass(viper, 'alpha', one), untilTicksPass(viper, 'beta', other)]);
  },
);

test('a VM that runs is deleted only by force, and then nothing of it is left', options, async () => {
  const { id } = await view('beta');
  const error = await refused(viper.deleteVm({ params: { vm: 'beta' } }), 'wrong_state');
  assert.equal(error.details.state, 'running');
  await untilTicksPass(viper, 'beta', await ticks(viper, 'beta'));
  await remove('beta');
  await assertGone(north, id);
});

test(
  'the guest agent stops a VM, whose clone then starts from the same disk with a name of its own',
  options,
  async () => {
    // Deaf to the power button, so that only the agent is left.
    await sh(viper, 'alpha', 'rm -r /etc/acpi; sync');
    await stop('alpha');
    const { state, lastExit, pid, id } = await view('alpha');
    assert.deepEqual(
      [state, lastExit?.reason, pid, await findQemu(id)],
      ['stopped', 'shutdown', undefined, null],
    );

    await clone('alpha', 'copy');
    assert.equal((await view('copy')).state, 'stopped');
    await start('copy');
    assert.equal((await booted(viper, 'copy')).hostname, 'copy');
    assert.equal(
      await sh(viper, 'copy', 'cat /data/mark; cat /run/mark 2>/dev/null || echo booted'),
      'kept\nbooted',
    );
    assert.equal((await view('alpha')).state, 'stopped');
  },
);

test('the power button stops a VM whose agent does not answer', options, async () => {
  await sh(viper, 'copy', '(sleep 0.2; kill -STOP $(pidof qemu-ga)) > /dev/null 2>&1 &');
  await refused(exec('copy', { argv: ['/bin/sleep', '10'], timeoutMs: 5000 }), 'agent_unavailable');
  await stop('copy', { graceMs: 120_000 });
  const { state, lastExit } = await view('copy');
  assert.deepEqual([state, lastExit?.reason], ['stopped', 'shutdown']);
  await remove('copy');
});

test('VMs start from a golden snapshot without booting, each as itself', options, async () => {
  await Promise.all([startGolden('g-1'), startGolden('g-2')]);
  const snapshot = await viper.getSnapshot({ params: { snapshot: 'golden' } });
  for (const vm of ['g-1', 'g-2']) {
    const { spec, origin, id } = await view(vm);
    assert.deepEqual(origin, { kind: 'snapshot', snapshotId: snapshot.id });
    assert.equal(
      await sh(viper, vm, 'hostname; cat /etc/machine-id; cat /sys/class/net/eth0/address'),
      [vm, id.replaceAll('-', ''), spec.nets[0]!.mac].join('\n'),
    );
    // Its console shows no boot: the guest has never been without its memory.
    assert.doesNotMatch(await viper.getConsoleLog({ params: { vm } }), /Linux version/);
  }
  const attempt = (body: object) => viper.createVm({ body: { name: 'g-3', snapshot: 'golden', ...body } });
  await refused(attempt({ hardware: { memoryBytes: 512 * MiB } }), 'invalid_request');
  await refused(attempt({ start: false }), 'invalid_request');
  await refused(viper.createSnapshot({ body: { name: 'golden', image: 'tiny' } }), 'name_taken');
  assert.deepEqual(await readdir(path.join(north.directory, 'snapshots')), [snapshot.id]);
  assert.equal(existsSync(directoryOf(north, snapshot.id)), false, 'the template VM is left');
});

test(
  'a guest that powers itself off has shut down, also when its memory came from a snapshot',
  options,
  async () => {
    await sh(viper, 'g-1', '(sleep 0.2; poweroff) > /dev/null 2>&1 &');
    const { lastExit } = await until(
      'the end of g-1',
      () => view('g-1'),
      ({ state }) => state === 'stopped',
    );
    assert.equal(lastExit?.reason, 'shutdown');
  },
);

test(
  'a guest that will not stop is ended by force after the grace time, or at once if that is asked for',
  options,
  async () => {
    await sh(viper, 'g-2', 'rm -r /etc/acpi; rm /usr/sbin/shutdown');
    await stop('g-2', { graceMs: 1500 });
    assert.equal((await view('g-2')).lastExit?.reason, 'forced');
    await startGolden('g-4');
    await stop('g-4', { force: true });
    assert.equal((await view('g-4')).lastExit?.reason, 'forced');
  },
);

// --- operations and events

test('an operation is told by its progress, and its record stays', options, async () => {
  const phases = new Set<string>();
  const asked = await viper.createVm({ body: { name: 'watched', snapshot: 'golden' } });
  const ended = await viper.wait(asked, { onProgress: ({ progress }) => phases.add(progress?.phase ?? '') });
  assert.deepEqual(
    [ended.state, ended.kind, ended.result?.vmId],
    ['succeeded', 'vm.create', asked.subject.vmId],
  );
  assert.ok(phases.has('start'), [...phases].join());
  assert.deepEqual(await viper.getOperation({ params: { operation: asked.id } }), ended);
  await refused(viper.cancelOperation({ params: { operation: asked.id } }), 'wrong_state');
  await remove('watched');
});

test('a create that is cancelled, in whatever phase, leaves nothing', options, async () => {
  for (const phase of ['disk', 'start']) {
    const asked = await viper.createVm({ body: { name: 'never', snapshot: 'golden' } });
    await recorder.first(`phase ${phase}`, ({ data }) => {
      const { id, progress } = (data.operation ?? {}) as typeof asked;
      return id === asked.id && progress?.phase === phase;
    });
    await viper.cancelOperation({ params: { operation: asked.id } });
    const error = await refused(viper.wait(asked), 'cancelled');
    assert.equal(error.operationId, asked.id);
    await assertGone(north, asked.subject.vmId!);
  }
});

test(
  'a clone that is cancelled leaves nothing, and its original runs on and can be used again',
  options,
  async () => {
    await startGolden('original');
    const asked = await viper.cloneVm({ params: { vm: 'original' }, body: { name: 'never' } });
    await viper.cancelOperation({ params: { operation: asked.id } });
    await refused(viper.wait(asked), 'cancelled');
    await assertGone(north, asked.subject.vmId!);
    assert.deepEqual(await readdir(path.join(north.directory, 'captures')), []);
    const original = await view('original');
    assert.deepEqual([original.state, original.operationId], ['running', undefined]);
    await untilTicksPass(viper, 'original', await ticks(viper, 'original'));
  },
);

test('a golden snapshot that is cancelled while its guest boots leaves nothing', options, async () => {
  const asked = await viper.createSnapshot({ body: { name: 'never', image: 'tiny', instanceType: 'tiny' } });
  const id = asked.subject.snapshotId!;
  await until('the QEMU of the template', () => findQemu(id));
  await refused(viper.createSnapshot({ body: { name: 'never', image: 'tiny' } }), 'name_taken');
  const { details } = await refused(viper.deleteImage({ params: { image: 'tiny' } }), 'in_use');
  assert.ok((details.usedBy as { name: string }[]).some(({ name }) => name === 'never'));
  await viper.cancelOperation({ params: { operation: asked.id } });
  await refused(viper.wait(asked), 'cancelled');
  await assertGone(north, id);
  assert.equal(existsSync(path.join(north.directory, 'snapshots', id)), false);
});

const ask: Record<VmAction, (vm: string) => Promise<unknown>> = {
  start: (vm) => viper.startVm({ params: { vm } }),
  stop: (vm) => viper.stopVm({ params: { vm }, body: {} }),
  pause: (vm) => viper.pauseVm({ params: { vm } }),
  resume: (vm) => viper.resumeVm({ params: { vm } }),
  clone: (vm) => viper.cloneVm({ params: { vm }, body: { name: 'refused' } }),
  delete: (vm) => viper.deleteVm({ params: { vm } }),
  migrate: (vm) => viper.migrateVm({ params: { vm }, body: { to: 'nowhere' } }),
  console: (vm) => viper.attachConsole({ params: { vm } }).then((session) => session[Symbol.asyncDispose]()),
  guest: (vm) => viper.getGuest({ params: { vm } }),
};

test(
  'in each state, what is not among the allowed actions is refused with the state and what is allowed',
  options,
  async () => {
    const check = async (state: Vm['state']) => {
      const vm = await view('original');
      assert.equal(vm.state, state);
      assert.deepEqual(vm.allowedActions, allowedActions(state));
      for (const action of vmActions.filter((each) => !vm.allowedActions.includes(each))) {
        const { details } = await refused(ask[action]('original'), 'wrong_state');
        assert.deepEqual([details.state, details.allowed], [state, vm.allowedActions], action);
      }
      // Those that change nothing are asked for as well.
      for (const action of ['console', 'guest'] as const)
        if (vm.allowedActions.includes(action)) await ask[action]('original');
    };
    await check('running');
    await pause('original');
    await check('paused');
    await resume('original');
    process.kill((await view('original')).pid!, 'SIGKILL');
    await until(
      'the crash',
      () => view('original'),
      ({ state }) => state === 'crashed',
    );
    await check('crashed');
    await start('original');
    await stop('original', { force: true });
    await check('stopped');
  },
);

test(
  'while an operation is at work on a VM, others are refused with its id; looking goes on',
  options,
  async () => {
    await booted(viper, await startGolden('worked-on'));
    const asked = await viper.cloneVm({ params: { vm: 'worked-on' }, body: { name: 'second' } });
    const vm = await view('worked-on');
    assert.deepEqual([vm.operationId, vm.allowedActions], [asked.id, ['console', 'guest']]);
    for (const action of vmActions) {
      if (vm.allowedActions.includes(action)) await ask[action]('worked-on');
      else
        assert.equal((await refused(ask[action]('worked-on'), 'busy')).details.operationId, asked.id, action);
    }
    await viper.wait(asked);
  },
);

test(
  'the stream of events goes on over a restart of the daemon, with none missing and none twice',
  options,
  async () => {
    const { id: lastBefore } = recorder.events.at(-1)!;
    await north.stop();
    await north.start();
    await pause('worked-on');
    await recorder.first('the pause', ({ id, kind }) => id > lastBefore && kind === 'vm.paused');
    const ids = recorder.events.map(({ id }) => id);
    assert.deepEqual(
      ids,
      [...new Set(ids)].sort((a, b) => a - b),
    );
    assert.equal(
      recorder.events.find(({ kind }) => kind === 'gap'),
      undefined,
    );
    // What the log still holds was all seen: progress that was reported over is not kept.
    const seen = new Set(ids);
    const last = ids.at(-1)!;
    for await (const event of viper.events({ after: 0 })) {
      assert.ok(seen.has(event.id), `event ${event.id} (${event.kind}) was never seen`);
      if (event.id >= last) break;
    }
  },
);

test('a daemon that ends in order takes nothing with it', options, async () => {
  const { pid } = await view('worked-on');
  await north.stop();
  assert.equal(
    execFileSync('ps', ['-o', 'stat=', '-p', String(pid)], { encoding: 'utf8' }).trim().length > 0,
    true,
  );
  await north.start();
  assert.deepEqual([(await view('worked-on')).pid, (await view('worked-on')).state], [pid, 'paused']);
  await resume('worked-on');
  await untilTicksPass(viper, 'worked-on', await ticks(viper, 'worked-on'));
});
