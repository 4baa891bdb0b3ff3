/** Whether a QEMU is bound to post-copy, by what QEMU says one question after the other. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import type { MigrationStatus, QmpConnection } from '../qmp/index.ts';
import { isBoundToPostcopy } from './memory-out.ts';

/** Gives these answers; the last one again and again. */
function asked(...answers: MigrationStatus[]): QmpConnection {
  let count = 0;
  const execute = async () => ({ status: answers[Math.min(count++, answers.length - 1)] });
  return { execute } as unknown as QmpConnection;
}
const never = new AbortController().signal;
const isBound = (qmp: QmpConnection, wasLetGo: boolean, signal = never) =>
  isBoundToPostcopy(qmp, { wasLetGo, signal });

test('a QEMU that was let go is asked until it has begun post-copy or failed before', async () => {
  assert.ok(await isBound(asked('pre-switchover', 'postcopy-active', 'postcopy-paused'), true));
  assert.equal(await isBound(asked('pre-switchover', 'postcopy-active', 'failed'), true), false);
});

test('a QEMU that still stands at its pause, or is done with a pre-copy, can be taken back', async () => {
  for (const status of ['pre-switchover', 'completed', 'failed', 'cancelled', 'none'] as const)
    assert.equal(await isBound(asked(status), false), false);
});

test('a QEMU that is in post-copy for as long as anybody waits is bound', async () => {
  assert.ok(await isBound(asked('postcopy-active'), false, AbortSignal.abort()));
});
