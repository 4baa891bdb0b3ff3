/**
 * What dies in the middle of a migration, and what a user stops: afterwards one side runs the VM, it verifies its
 * memory and disk, and the other side has nothing of it.
 */
import assert from 'node:assert/strict';
import { existsSync } from 'node:fs';
import { rm } from 'node:fs/promises';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { DestinationMigration } from '../../src/migration/destination.ts';
import type { DestinationState } from '../../src/migration/destination-machine.ts';
import type { ToSource } from '../../src/migration/protocol.ts';
import type { SourceState } from '../../src/migration/source-machine.ts';
import type { MigrationPhase } from '../../src/model/migration.ts';
import type { Machine } from '../../src/vm/machine.ts';
import { isAlive } from '../../src/vm/process.ts';
import { checked, startCheckers } from './checking-guest.ts';
import { assertNothingLeft, Lab, options, streamPair } from './migration-lab.ts';

/** Slow enough to be met in every phase. */
const slow = { limits: { downtimeMs: 300, autoConverge: false, bandwidthBps: 200_000_000 } };

test('a migration cancelled in any phase leaves the VM running and nothing at the destination', async (context) => {
  await using lab = await Lab.make();
  const machine = await lab.boot(lab.a);
  await startCheckers(machine);
  for (const phase of ['preflight', 'disk', 'memory'] satisfies MigrationPhase[]) {
    const pair = await lab.migration(lab.a, lab.b, machine, slow);
    await pair.source.start();
    await pair.untilPhase(phase);
    const askedAt = performance.now();
    await pair.source.cancel();
    assert.deepEqual(await machine.status(), { running: true, state: 'running' });
    context.diagnostic(
      `${phase}: the VM runs ${Math.round(performance.now() - askedAt)} ms after the cancel`,
    );
    const state = await pair.source.waitUntilOver();
    assert.equal(state.name === 'ended' && state.ending.code, 'cancelled');
    await pair.untilDestination('absent');
    assert.ok(!existsSync(lab.b.directory));
    await assertNothingLeft(machine, lab.a);
    await checked(machine, { memory: 4, disk: 2 });
    await pair.stop();
  }
});

test('a destination QEMU that is killed before the commit costs nothing but the attempt', async () => {
  await using lab = await Lab.make();
  const machine = await lab.boot(lab.a);
  await startCheckers(machine);
  for (const phase of ['disk', 'memory'] satisfies MigrationPhase[]) {
    const pair = await lab.migration(lab.a, lab.b, machine, slow);
    await pair.source.start();
    await pair.untilPhase(phase);
    await pair.destination.machine!.kill();
    const state = await pair.source.waitUntilOver();
    assert.ok(state.name === 'ended' && ['failed', 'rejected'].includes(state.ending.code));
    await pair.untilDestination('absent');
    assert.ok(!existsSync(lab.b.directory));
    await assertNothingLeft(machine, lab.a);
    await checked(machine, { memory: 4, disk: 2 });
    await pair.stop();
  }
});

test('a destination that cannot load the VM rejects it, and the source takes it back', async () => {
  await using lab = await Lab.make();
  const machine = await lab.boot(lab.a);
  await startCheckers(machine);
  const pair = await lab.migration(lab.a, lab.b, machine);
  pair.beforeDelivery = async (message) => {
    if (message.name === 'commit') await pair.destination.machine?.kill();
  };
  await pair.source.start();
  const state = await pair.source.waitUntilOver();
  assert.equal(state.name === 'ended' && state.ending.code, 'rejected');
  assert.equal(state.epoch, 3);
  await pair.untilDestination('absent');
  assert.deepEqual(pair.told, []);
  assert.deepEqual(await machine.status(), { running: true, state: 'running' });
  await checked(machine);
  await assertNothingLeft(machine, lab.a);
  // And it can still move.
  const again = await lab.migration(lab.a, lab.b, machine, { epoch: 3 });
  // Also if the link is cut while QEMU greets the server of the disk, for which its guest must not stand still for long.
  again.silentDisks = 1;
  await again.source.start();
  assert.equal((await again.source.waitUntilOver()).name, 'moved');
  await again.untilDestination('settled');
  await checked(again.destination.machine!);
});

test('a post-copy whose destination dies before it has the commit is taken back', async () => {
  await using lab = await Lab.make();
  const machine = await lab.boot(lab.a);
  await startCheckers(machine);
  const pair = await lab.migration(lab.a, lab.b, machine, { mode: 'postcopy' });
  pair.beforeDelivery = async (message) => {
    if (message.name === 'commit') await pair.destination.machine?.kill();
  };
  await pair.source.start();
  const state = await pair.source.waitUntilOver();
  assert.equal(state.name === 'ended' && state.ending.code, 'rejected');
  await pair.untilDestination('absent');
  assert.deepEqual(pair.told, []);
  assert.deepEqual(await machine.status(), { running: true, state: 'running' });
  await checked(machine);
  await assertNothingLeft(machine, lab.a);
});

test('a post-copy that the destination cannot load ends with a crashed VM at the source and word of it', async () => {
  await using lab = await Lab.make();
  const machine = await lab.boot(lab.a);
  const pair = await lab.migration(lab.a, lab.b, machine, { mode: 'postcopy' });
  const dies = async ({ process: { pid } }: Machine): Promise<void> => {
    while ((await machine.qmp.execute('query-migrate')).status !== 'postcopy-active') await sleep(5);
    process.kill(pid, 'SIGKILL');
  };
  let isHanging = false;
  pair.beforeDelivery = async (message) => {
    if (message.name !== 'committed' || isHanging) return;
    isHanging = true;
    const there = pair.destination.machine!;
    // It takes the last state and never gets to load it.
    process.kill(there.process.pid, 'SIGSTOP');
    dies(there).catch((error) => pair.failures.push(error));
  };
  await pair.source.start();
  assert.equal((await pair.source.waitUntilOver()).name, 'ended');
  await pair.untilDestination('absent');
  assert.ok(!(await isAlive(machine.process)) && existsSync(lab.a.directory) && !existsSync(lab.b.directory));
  assert.deepEqual(pair.failures, []);
  assert.match(pair.told.join(), /crashed at the source and can be started from its disk/);
});

test('a post-copy that loses its session goes on over a new one', async () => {
  await using lab = await Lab.make();
  const machine = await lab.boot(lab.a);
  await startCheckers(machine);
  const pair = await lab.migration(lab.a, lab.b, machine, { mode: 'postcopy', ...slow });
  await pair.source.start();
  await pair.source.waitFor(({ name }) => name === 'serving');
  pair.cutSessions();
  await pair.untilRecovered;
  assert.equal((await pair.source.waitUntilOver()).name, 'moved');
  await pair.untilDestination('settled');
  await checked(pair.destination.machine!);
  await assertNothingLeft(pair.destination.machine!, lab.b);
});

test('a daemon that starts beside a QEMU that waits for a page brings it the stream that it lacks', async () => {
  await using lab = await Lab.make();
  const machine = await lab.boot(lab.a);
  await startCheckers(machine);
  const pair = await lab.migration(lab.a, lab.b, machine, { mode: 'postcopy', ...slow });
  pair.crashAt('destination', 'owning');
  await pair.source.start();
  await pair.crashed;
  await pair.restartBesideSilentQemu();
  assert.equal((await pair.source.waitUntilOver()).name, 'moved');
  await pair.untilDestination('settled');
  await checked(pair.destination.machine!);
  await assertNothingLeft(pair.destination.machine!, lab.b);
});

test('a source QEMU that is killed before the commit leaves nothing at the destination', async () => {
  await using lab = await Lab.make();
  const machine = await lab.boot(lab.a);
  const pair = await lab.migration(lab.a, lab.b, machine, slow);
  await pair.source.start();
  await pair.untilPhase('memory');
  await machine.kill();
  const state = await pair.source.waitUntilOver();
  assert.equal(state.name, 'ended');
  await pair.untilDestination('absent');
  assert.ok(!existsSync(lab.b.directory));
});

test('a daemon that dies after any journalled step goes on from there', async (context) => {
  await using lab = await Lab.make();
  let machine = await lab.boot(lab.a);
  await startCheckers(machine);
  let [from, to] = [lab.a, lab.b];
  let epoch = 1;
  const cases: (['source', SourceState['name']] | ['destination', DestinationState['name']])[] = [
    ['source', 'preparing'],
    ['source', 'copying'],
    ['source', 'switching'],
    ['source', 'leaving'],
    ['source', 'moved'],
    ['destination', 'reserved'],
    ['destination', 'waiting'],
    ['destination', 'owning'],
    ['destination', 'arrived'],
  ];
  for (const [side, name] of cases) {
    const pair = await lab.migration(from, to, machine, { epoch });
    pair.crashAt(side, name);
    await pair.source.start();
    await pair.crashed;
    await pair.restart(side);
    const state = await pair.source.waitUntilOver();
    context.diagnostic(`${side} dies in ${name}: ${state.name}`);
    if (state.name === 'moved') {
      await pair.untilDestination('settled');
      assert.ok(!(await isAlive(pair.sourceMachine.process)));
      assert.ok(!existsSync(from.directory));
      machine = pair.destination.machine!;
      [from, to] = [to, from];
    } else {
      await pair.untilDestination('absent');
      assert.ok(!existsSync(to.directory));
      machine = pair.sourceMachine;
    }
    epoch = state.epoch;
    assert.deepEqual(await machine.status(), { running: true, state: 'running' });
    await assertNothingLeft(machine, from);
    await checked(machine, { memory: 6, disk: 3 });
    await pair.stop();
  }
});

/** From the stream of a real QEMU (`QEMU_VM_FILE_MAGIC`, version 3, its configuration section with a name's length). */
const header = Buffer.from('5145564d0000000307', 'hex');
const badStreams: [string, Buffer][] = [
  ['is garbage', Buffer.alloc(8192, 0xa5)],
  ['ends early', header],
  ['claims a length that nobody has', Buffer.concat([header, Buffer.alloc(4, 0xff), Buffer.alloc(4096)])],
  // A page whose block has 2^63 bytes: section START of `ram`, MEM_SIZE.
  [
    'claims 2^63 bytes of memory',
    Buffer.concat([
      Buffer.from('5145564d00000003', 'hex'),
      Buffer.from('0100000002', 'hex'),
      Buffer.from('\x03ram', 'latin1'),
      Buffer.from('0000000000000004', 'hex'),
      Buffer.from('8000000000000004', 'hex'),
    ]),
  ],
];

test('a stream of memory that is nonsense is refused, and nothing of it is left', async () => {
  await using lab = await Lab.make();
  for (const engine of ['direct', 'condensed'] as const) {
    for (const [what, bytes] of badStreams) {
      const sent: ToSource[] = [];
      const migration = new DestinationMigration({
        vm: await lab.vmToMove(lab.a, 1),
        options: { ...options, storage: 'shared', engine },
        state: { name: 'absent' },
        surroundings: {
          journal: { append: () => {} },
          send: async (message) => void sent.push(message),
          check: async () => [],
          make: () => lab.launch(lab.b, true),
          discard: () => rm(lab.b.directory, { recursive: true, force: true }),
          onFailure: (error) => assert.fail(error),
        },
      });
      await migration.receive({ name: 'prepare', vm: await lab.vmToMove(lab.a, 1), options });
      const prepared = sent.find((message) => message.name === 'prepared')!;
      const { process } = migration.machine!;
      const [near, far] = await streamPair();
      near.on('error', () => {}).resume();
      migration.accept('memory', prepared.ticket.secret, far);
      assert.throws(() => migration.accept('memory', prepared.ticket.secret, far), { code: 'forbidden' });
      near.end(bytes);
      const state = await migration.waitFor(({ name }) => name === 'rejected');
      assert.ok(state.name === 'rejected' && state.reason !== '', `a stream that ${what}, ${engine}`);
      assert.ok(!(await isAlive(process)) && !existsSync(lab.b.directory));
      near.destroy();
      await migration.stop();
    }
  }
});
