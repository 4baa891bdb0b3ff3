/** The source's driver where it needs no QEMU. */
import assert from 'node:assert/strict';
import type { Duplex } from 'node:stream';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import type { VmToMove } from '../model/migration.ts';
import { FakeRelay } from './relayed/fake-relay.ts';
import { SourceMigration } from './source.ts';
import { plannedSource } from './source-machine.ts';

test('a cancel does not wait behind questions that nobody has answered', async (context) => {
  const sent: string[] = [];
  const migration = new SourceMigration({
    id: 'first',
    vm: { id: 'one', spec: { memoryBytes: 0 }, diskBytes: 0 } as VmToMove,
    options: {
      mode: 'precopy',
      storage: 'copied',
      limits: { downtimeMs: 300, autoConverge: false },
      channels: 0,
    },
    state: { name: 'preparing', epoch: 1 },
    machine: null,
    // Many fall due while one waits for its answer.
    retryMs: 1,
    surroundings: {
      journal: { append: () => {} },
      send: async (message) => {
        await sleep(20);
        sent.push(message.name);
        throw new Error('nobody there');
      },
      openSession: () => assert.fail('there is no ticket'),
      discard: async () => {},
      tellOperator: () => {},
      onFailure: (error) => assert.fail(error),
    },
  });
  context.after(() => migration.stop());
  while (sent.length < 3) await sleep(5);
  const before = sent.length;
  await migration.cancel();
  // The one that was on its way, and the word of the end.
  assert.deepEqual(sent.slice(before).slice(-1), ['abort']);
  assert.ok(sent.length <= before + 2, sent.join());
});

test('sessions with relays open while the destination prepares, and end when it refuses', async () => {
  const relay = new FakeRelay();
  const opened = Promise.withResolvers<Duplex>();
  const migration = new SourceMigration({
    id: 'second',
    vm: { id: 'one', spec: { memoryBytes: 0 }, diskBytes: 0 } as VmToMove,
    options: {
      engine: 'relayed',
      mode: 'postcopy',
      storage: 'shared',
      limits: { downtimeMs: 300, autoConverge: false },
      channels: 0,
      relayed: { relays: [{ id: relay.id, name: 'relay' }], replicas: 1 },
    },
    state: plannedSource(1),
    machine: null,
    surroundings: {
      journal: { append: () => {} },
      send: async () => {},
      openSession: () => assert.fail('there is no ticket'),
      openRelay: async (_relay, group) => {
        const session = await relay.open(group);
        opened.resolve(session);
        return session;
      },
      discard: async () => {},
      tellOperator: () => {},
      onFailure: (error) => assert.fail(error),
    },
  });
  await migration.start();
  const session = await opened.promise;
  await migration.receive({ name: 'refused', problems: [] });
  assert.equal(migration.state.name, 'ended');
  await migration.stop();
  while (!session.writableEnded) await sleep(1);
});
