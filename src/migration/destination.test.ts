/** The destination's driver where it needs no QEMU: what a repeated message meets. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import type { VmToMove } from '../model/migration.ts';
import { DestinationMigration } from './destination.ts';
import type { Problem, ToSource } from './protocol.ts';

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
