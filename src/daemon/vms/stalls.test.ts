/** VMs that stand still for their disk, with a machine that only says so. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import type { FastifyBaseLogger } from 'fastify';
import { newId } from '../../model/ids.ts';
import type { Machine } from '../../vm/machine.ts';
import type { EventLog } from '../events.ts';
import type { Managed } from './registry.ts';
import { Stalls } from './stalls.ts';

test('a VM that has arrived goes on when its disk works again, though its migration is not over', {
  timeout: 20_000,
}, async () => {
  let reason: string | undefined = 'its disk gives errors';
  const machine = {
    stall: async () => reason,
    resume: async () => {
      reason = undefined;
    },
  } as unknown as Machine;
  const record = { id: newId(), name: 'web' } as Managed['record'];
  const managed: Managed = { record, machine, operationId: newId(), hasArrived: true };
  const told: string[] = [];
  const stalls = new Stalls({
    runner: { hasRoomFor: async () => true },
    events: { append: ({ kind }: { kind: string }) => void told.push(kind) } as unknown as EventLog,
    log: { error: () => {} } as unknown as FastifyBaseLogger,
    closing: AbortSignal.timeout(15_000),
  });
  await stalls.follow(managed, machine, async () => {});
  assert.equal(reason, undefined);
  assert.deepEqual(told, ['vm.stalled']);
  assert.equal(managed.stalled, undefined);
});
