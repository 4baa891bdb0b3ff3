import assert from 'node:assert/strict';
import { test } from 'node:test';
import type { QmpConnection, QmpEvent } from '../qmp/index.ts';
import { WakeUps } from './wake-ups.ts';

/** A QEMU that says what it is told to say. */
function talking() {
  let listener: ((event: QmpEvent) => void) | undefined;
  const qmp = {
    onEvent(each: (event: QmpEvent) => void) {
      listener = each;
      return () => {
        listener = undefined;
      };
    },
  } as unknown as QmpConnection;
  const say = (name: QmpEvent['name']) => listener?.({ name } as QmpEvent);
  return { qmp, say, hasListener: () => listener !== undefined };
}
/** Only an event ends such a rest, within the time of a test. */
const longMs = 2 ** 30;
const never = new AbortController().signal;

test('an event ends the rest, and one that came before it as well, but each only one', async () => {
  const { qmp, say, hasListener } = talking();
  const wakeUps = new WakeUps(qmp, ['MIGRATION']);
  say('MIGRATION');
  say('MIGRATION');
  await wakeUps.rest(longMs, never);
  let rested = false;
  const second = wakeUps.rest(longMs, never).then(() => {
    rested = true;
  });
  say('STOP');
  await new Promise(setImmediate);
  assert.equal(rested, false);
  say('MIGRATION');
  await second;
  await wakeUps.rest(1, never);
  wakeUps[Symbol.dispose]();
  assert.equal(hasListener(), false);
});

test('an abort ends the rest with its reason', async () => {
  const wakeUps = new WakeUps(talking().qmp, []);
  const abort = new AbortController();
  const rest = wakeUps.rest(longMs, abort.signal);
  abort.abort();
  await assert.rejects(rest, { code: 'cancelled' });
});
