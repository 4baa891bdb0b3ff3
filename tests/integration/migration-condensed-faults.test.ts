/**
 * The condensed engine's post-copy, which the source QEMU knows nothing of: it can be taken back, and it goes on
 * whatever is lost of the agents. One VM goes through all of it and verifies itself.
 */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { checked, startCheckers } from './checking-guest.ts';
import { assertNothingLeft, Lab } from './migration-lab.ts';

/** So slow that what is to be met in the middle is met there. */
const condensed = {
  engine: 'condensed',
  mode: 'postcopy',
  limits: { downtimeMs: 300, autoConverge: false, bandwidthBps: 100_000_000 },
} as const;

test('a post-copy that is rejected is taken back; one that loses its agents goes on', async (context) => {
  await using lab = await Lab.make();
  let machine = await lab.boot(lab.a);
  await startCheckers(machine);

  // The destination dies when it should run the VM.
  const rejected = await lab.migration(lab.a, lab.b, machine, condensed);
  rejected.beforeDelivery = async (message) => {
    if (message.name === 'commit') await rejected.destination.machine?.kill();
  };
  await rejected.source.start();
  const ended = await rejected.source.waitUntilOver();
  assert.equal(ended.name === 'ended' && ended.ending.code, 'rejected');
  await rejected.untilDestination('absent');
  assert.deepEqual(rejected.told, []);
  assert.deepEqual(await machine.status(), { running: true, state: 'running' });
  await checked(machine, { memory: 4, disk: 2 });
  await assertNothingLeft(machine, lab.a);

  // The session is lost while pages are missing; then the daemon of either side.
  let [from, to] = [lab.a, lab.b];
  let epoch = ended.epoch;
  for (const lost of ['session', 'source', 'destination'] as const) {
    const pair = await lab.migration(from, to, machine, { ...condensed, epoch });
    if (lost === 'source') pair.crashAt('source', 'serving');
    if (lost === 'destination') pair.crashAt('destination', 'arrived');
    await pair.source.start();
    if (lost === 'session') {
      await pair.source.waitFor(({ name }) => name === 'serving');
      pair.cutSessions();
    } else {
      await pair.crashed;
      await pair.restart(lost);
    }
    await pair.untilRecovered;
    assert.equal((await pair.source.waitUntilOver()).name, 'moved');
    await pair.untilDestination('settled');
    context.diagnostic(`${lost} lost: ${JSON.stringify(pair.source.result.condensed)}`);
    machine = pair.destination.machine!;
    await checked(machine, { memory: 26, disk: 4 });
    await assertNothingLeft(machine, to);
    assert.deepEqual(pair.told, []);
    [from, to] = [to, from];
    epoch += 1;
  }
});
