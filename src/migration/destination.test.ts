/** The destination's driver where it needs no QEMU: what a repeated message meets. */
import assert from 'node:assert/strict';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { PassThrough } from 'node:stream';
import { type TestContext, test } from 'node:test';
import { AppError } from '../model/errors.ts';
import { newId } from '../model/ids.ts';
import type { VmToMove } from '../model/migration.ts';
import { newKey } from '../relay/index.ts';
import { BlockTable } from '../stream/index.ts';
import { belowFile } from '../vm/arriving-disk.ts';
import type { Machine } from '../vm/machine.ts';
import { DestinationMigration } from './destination.ts';
import type { Problem, Ticket, ToSource } from './protocol.ts';
import { newDiskManifest } from './relayed/disk-manifest.ts';
import { Manifest } from './relayed/manifest.ts';

const vm = { id: 'one', epoch: 1 } as VmToMove;
const options = {
  mode: 'precopy',
  storage: 'copied',
  limits: { downtimeMs: 300, autoConverge: false },
  channels: 0,
} as const;
const division = {
  migrationId: newId(),
  key: newKey(),
  group: 'ab'.repeat(32),
  relays: [newId()],
  replicas: 1,
  partPages: 8,
};
const taken: Problem = {
  field: 'name',
  value: 'one',
  wanted: 'another',
  message: 'There is a VM of that name',
};

test('a prepare that comes again while the first is looked at finds what that one made, and refuses nothing', async (context) => {
  const sent: ToSource[] = [];
  const secondLook = Promise.withResolvers<Problem[]>();
  const made = Promise.withResolvers<never>();
  const makes = Promise.withResolvers<void>();
  const looks = [Promise.resolve([]), secondLook.promise];
  const migration = new DestinationMigration({
    vm,
    options,
    state: { name: 'absent' },
    surroundings: {
      journal: { append: () => {} },
      send: async (message) => void sent.push(message),
      check: () => looks.shift()!,
      make: () => {
        makes.resolve();
        return made.promise;
      },
      discard: async () => {},
      onFailure: (error) => assert.fail(error),
    },
  });
  context.after(() => migration.stop());
  const first = migration.receive({ name: 'prepare', vm, options });
  const second = migration.receive({ name: 'prepare', vm, options });
  await makes.promise;
  // The VM of the first is what the second finds in the way.
  secondLook.resolve([taken]);
  made.reject(new Error('no QEMU today'));
  await Promise.all([first, second]);
  const problems = sent.flatMap((message) => (message.name === 'refused' ? message.problems : []));
  assert.deepEqual(
    problems.map(({ field }) => field),
    ['prepare'],
  );
});

test('a post-copy that QEMU could not go on with is offered again until QEMU takes it', {
  timeout: 20_000,
}, async (context) => {
  const tickets: Ticket[] = [];
  const asked: ((ticket: Ticket) => void)[] = [];
  let refusals = 1;
  const execute = async (command: string) => {
    if (command === 'migrate-recover' && refusals-- > 0) throw new Error('not done with the stream before');
    // Nothing listens at its socket, so no stream ever reaches it.
    return command === 'query-status' ? { status: 'running', running: true } : { status: 'postcopy-paused' };
  };
  const machine = {
    qmp: { state: 'ready', execute, executeOutOfBand: execute, onEvent: () => () => {} },
    exited: new Promise(() => {}),
    paths: { qmp: '/nowhere/qmp.sock', incoming: '/nowhere/incoming.sock' },
  } as unknown as Machine;
  const migration = new DestinationMigration({
    vm,
    options,
    state: { name: 'arrived', epoch: 2, complete: false },
    machine,
    surroundings: {
      journal: { append: () => {} },
      send: async (message) => {
        if (message.name !== 'recover' || message.ticket.secret === tickets.at(-1)?.secret) return;
        tickets.push(message.ticket);
        asked.shift()?.(message.ticket);
      },
      check: async () => [],
      make: () => assert.fail('it is made already'),
      discard: async () => {},
      onFailure: (error) => assert.fail(error),
    },
  });
  context.after(() => migration.stop());
  const nextWish = () => new Promise<Ticket>((resolve) => asked.push(resolve));
  const first = nextWish();
  await migration.restart();
  const { secret } = await first;
  const second = nextWish();
  migration.accept('memory', secret, new PassThrough());
  await second;
  assert.equal(new Set(tickets.map((ticket) => ticket.secret)).size, 2);
});

test('a ticket that nobody came with in time is good for nothing, and what waited for it goes', async (context) => {
  const sent: ToSource[] = [];
  let isGone = false;
  const execute = async () => ({ status: 'none' });
  const machine = {
    qmp: { state: 'ready', version: { major: 10 }, execute, onEvent: () => () => {} },
    exited: new Promise(() => {}),
    kill: async () => {},
    paths: { qmp: '/nowhere/qmp.sock', incoming: '/nowhere/incoming.sock' },
  } as unknown as Machine;
  const migration = new DestinationMigration({
    vm,
    options,
    state: { name: 'absent' },
    ticketMs: 30,
    surroundings: {
      journal: { append: () => {} },
      send: async (message) => void sent.push(message),
      check: async () => [],
      make: async () => machine,
      discard: async () => {
        isGone = true;
      },
      onFailure: (error) => assert.fail(error),
    },
  });
  context.after(() => migration.stop());
  await migration.receive({ name: 'prepare', vm, options });
  const prepared = sent.find((message) => message.name === 'prepared')!;
  const state = await migration.waitFor(({ name }) => name === 'rejected');
  assert.match(state.name === 'rejected' ? state.reason : '', /Nobody came with the ticket in time/);
  assert.throws(() => migration.accept('memory', prepared.ticket.secret, new PassThrough()), {
    code: 'forbidden',
  });
  assert.ok(isGone);
});

/** As a daemon finds it whose host was started anew while the VM merged; `isThere`: its QEMU lives, and has all of it. */
function merging(context: TestContext, { isThere = false, claimedBy = 0, answers = true } = {}) {
  const table = new BlockTable([{ name: 'pc.ram', sizeBytes: 4096 }]);
  const manifest = new Manifest(division, { sectionId: 2, table });
  const seen = {
    sent: [] as ToSource[],
    told: [] as string[],
    asked: [] as boolean[],
    released: 0,
    discarded: 0,
  };
  const epoch = claimedBy > 0 ? claimedBy : undefined;
  const status = async () => ({ status: isThere ? 'completed' : 'none', running: true });
  const machine = {
    qmp: { state: 'ready', execute: status, onEvent: () => () => {} },
    exited: new Promise(() => {}),
    kill: async () => {},
    paths: { qmp: '/nowhere/qmp.sock', incoming: '/nowhere/incoming.sock' },
  } as unknown as Machine;
  const migration = new DestinationMigration({
    vm,
    options: { ...options, engine: 'relayed', mode: 'postcopy', storage: 'shared' },
    state: { name: 'merging', epoch: 2 },
    machine: isThere ? machine : null,
    retryMs: 5,
    surroundings: {
      journal: { append: () => {} },
      send: async (message) => void seen.sent.push(message),
      check: async () => [],
      make: () => assert.fail('it is made already'),
      discard: async () => void seen.discarded++,
      onFailure: (error) => assert.fail(error),
      merging: {
        openRelay: () => Promise.reject(new Error('away')),
        readManifest: async () => manifest.toBytes(),
        writeManifest: async () => {},
        removeManifest: async () => {},
        tellOperator: (message) => seen.told.push(message),
        escrow: {
          deposit: () => assert.fail('it is there already'),
          ask: async (isGone) => {
            seen.asked.push(isGone);
            return epoch;
          },
          release: () => {
            seen.released += 1;
            return answers ? Promise.resolve(epoch) : new Promise(() => {});
          },
        },
      },
    },
  });
  context.after(() => migration.stop());
  return { migration, seen };
}

test('a VM that is whole counts as such when its custodian has given it up, or an operator says that it is gone', async (context) => {
  const { migration, seen } = merging(context, { isThere: true });
  await migration.restart();
  assert.deepEqual([migration.state.name, seen.released], ['settled', 1]);
  const alone = merging(context, { isThere: true, answers: false });
  void alone.migration.restart();
  while (alone.seen.released === 0) await new Promise(setImmediate);
  assert.equal(alone.migration.state.name, 'merging');
  await alone.migration.claim('the custodian burnt down');
  await alone.migration.waitFor(({ name }) => name === 'settled');
});

test('a VM that was claimed at its custodian is yielded, however much of it is here', async (context) => {
  for (const isThere of [true, false]) {
    const { migration, seen } = merging(context, { isThere, claimedBy: 5 });
    void migration.restart();
    const state = await migration.waitFor(({ name }) => name === 'yielded');
    assert.equal('epoch' in state && state.epoch, 5);
    assert.equal(seen.discarded, 1);
    // A source that still waits for somebody to serve hears that nobody does.
    await migration.receive({ name: 'commit', epoch: 2 });
    assert.deepEqual(seen.sent.at(-1), { name: 'running', epoch: 5, complete: true });
    await migration.receive({ name: 'done' });
    assert.equal(migration.state.name, 'absent');
  }
});

test('a VM that ended while the daemon was away may go on elsewhere, until an operator gives that up', async (context) => {
  const { migration, seen } = merging(context);
  await migration.restart();
  assert.equal(migration.state.name, 'merging');
  assert.match(seen.told.join(), /The VM has ended before all of its memory was here/);
  while (seen.asked.length < 2) await new Promise((resolve) => setTimeout(resolve, 1));
  assert.deepEqual([...new Set(seen.asked)], [true], 'the custodian hears that nobody runs it here');
  assert.equal(seen.released, 0);
  await migration.claim('start it from its disk');
  await migration.waitFor(({ name }) => name === 'settled');
  assert.equal(seen.released, 1);
});

test('a VM that ends before anybody knows that it ran lets its source go, however long its disk takes', {
  timeout: 20_000,
}, async (context) => {
  const directory = await mkdtemp(path.join(tmpdir(), 'viper-ends-'));
  context.after(() => rm(directory, { recursive: true, force: true }));
  await writeFile(belowFile(directory), '');
  const relay = newId();
  const diskManifest = newDiskManifest({ ...division, relays: [relay] }, 4096);
  diskManifest.add({ slab: 1, parts: [50], holders: [0], runs: [[0, 1]] });
  const released = Promise.withResolvers<ToSource>();
  const migration = new DestinationMigration({
    vm: { ...vm, spec: { disk: { sizeBytes: 4096 } } } as VmToMove,
    options: {
      ...options,
      engine: 'relayed',
      mode: 'postcopy',
      relayed: { relays: [], replicas: 1, diskRelays: [{ id: relay, name: 'north' }] },
    },
    state: { name: 'owning', epoch: 2 },
    surroundings: {
      journal: { append: () => {} },
      send: async (message) => void (message.name === 'running' && released.resolve(message)),
      check: async () => [],
      make: () => assert.fail('it is made already'),
      discard: async () => {},
      onFailure: (error) => assert.fail(error),
      merging: {
        openRelay: () => Promise.reject(new AppError('peer_unreachable', 'The relay is away')),
        readManifest: async () => undefined,
        writeManifest: async () => {},
        removeManifest: async () => {},
        tellOperator: () => {},
        disk: {
          directory,
          file: path.join(directory, 'disk.qcow2'),
          image: { file: '/nowhere', format: 'raw' },
          readManifest: async () => diskManifest.toBytes(),
          writeManifest: async () => {},
          removeManifest: async () => {},
        },
      },
    },
  });
  context.after(() => migration.stop());
  migration.restart().catch(() => {});
  assert.deepEqual(await released.promise, { name: 'running', epoch: 2, complete: false, divided: true });
  await migration.receive({ name: 'done' });
  assert.equal(migration.state.name, 'merging');
});
