/** Real sessions that share one limit. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { KiB, MiB } from '../model/units.ts';
import { fakeDaemons } from './fake-daemons.ts';
import { RateLimiter } from './rate-limiter.ts';
import type { Session } from './session.ts';

/** Writes for as long as it is not disposed. */
function flood(sessions: Session[]): Disposable {
  const bytes = Buffer.alloc(64 * KiB);
  let isOver = false;
  for (const session of sessions) {
    const write = (): void => {
      while (!isOver && !session.destroyed && session.write(bytes));
    };
    session.on('drain', write);
    write();
  }
  return {
    [Symbol.dispose]() {
      isOver = true;
      for (const session of sessions) session.destroy();
    },
  };
}

test('two VMs share the limit of a cloudlet fairly, though one has four sessions and the other one', async () => {
  await using daemons = await fakeDaemons();
  const limiters = [new RateLimiter(40_000_000)];
  const [one, other] = [{}, {}];
  const sent: Session[] = [];
  for (const party of [one, one, other, one, one]) {
    const { client, server } = await daemons.pair({ sharedLimits: { limiters, party } });
    server.resume();
    sent.push(client);
  }
  // All begin when all are there.
  using _ = flood(sent);
  const sentBytes = (...sessions: Session[]) => sessions.reduce((sum, { stats }) => sum + stats.sentBytes, 0);
  const [a, b, single, c, d] = sent as [Session, Session, Session, Session, Session];
  await daemons.until(() => sentBytes(single) > 4 * MiB, 'the single session has sent 4 MiB');
  const share = sentBytes(a, b, c, d) / sentBytes(single);
  assert.ok(share > 0.7 && share < 1.4, `the four sent ${share} times what the single one did`);
});

test('the limit of one VM holds for all its sessions together, within that of the cloudlet', async () => {
  await using daemons = await fakeDaemons();
  const cloudlet = new RateLimiter(400_000_000);
  const slow = { limiters: [new RateLimiter(8_000_000), cloudlet], party: {} };
  const fast = { limiters: [new RateLimiter(null), cloudlet], party: {} };
  const pairs = [];
  for (const sharedLimits of [slow, slow, fast]) pairs.push(await daemons.pair({ sharedLimits }));
  for (const { server } of pairs) server.resume();
  using _ = flood(pairs.map(({ client }) => client));
  const [a, b, free] = pairs.map(({ client }) => client) as [Session, Session, Session];
  await daemons.until(() => a.stats.sentBytes + b.stats.sentBytes > MiB, 'the slow VM has sent 1 MiB');
  const slowBytes = a.stats.sentBytes + b.stats.sentBytes;
  assert.ok(free.stats.sentBytes > 4 * slowBytes, `${free.stats.sentBytes} beside ${slowBytes}`);
});
