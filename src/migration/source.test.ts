/** The source's driver where it needs no QEMU: a cancel while the destination does not answer. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import type { VmToMove } from '../model/migration.ts';
import { SourceMigration } from './source.ts';

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
