/** The destination's driver where it needs no QEMU: what a repeated message meets. */
import assert from 'node:assert/strict';
import { PassThrough } from 'node:stream';
import { test } from 'node:test';
import type { VmToMove } from '../model/migration.ts';
import type { Machine } from '../vm/machine.ts';
import { DestinationMigration } from './destination.ts';
import type { Problem, Ticket, ToSource } from './protocol.ts';

const vm = { id: 'one', epoch: 1 } as VmToMove;
const options = {
  mode: 'precopy',
  storage: 'copied',
  limits: { downtimeMs: 300, autoConverge: false },
  channels: 0,
} as const;
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
