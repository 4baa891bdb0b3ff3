import assert from 'node:assert/strict';
import { test } from 'node:test';
import { defaultTriggerPolicy as policy } from '../../follow/trigger.ts';
import { newId } from '../../model/ids.ts';
import { DeviceWatch } from './device-watch.ts';

test('what a device reported of its RTTs counts until it is lost, and again when it is back', () => {
  const [here, there] = [newId(), newId()];
  let nowMs = 1000;
  using watch = new DeviceWatch({
    ownId: here,
    policy,
    watchEveryMs: 200,
    movedAtMs: undefined,
    onTrigger: async () => ({ moved: false }),
    now: () => nowMs,
  });
  const rtts = [{ cloudletId: there, rttMs: 51 }];
  watch.report(here, rtts);
  nowMs += policy.lostAfterMs - 1;
  assert.deepEqual([...watch.reported()], [[there, 51]]);
  nowMs += 1;
  assert.deepEqual([...watch.reported()], []);
  watch.report(here, rtts);
  assert.deepEqual([...watch.reported()], [[there, 51]]);
});
