import assert from 'node:assert/strict';
import { test } from 'node:test';
import { EarlyConnection } from './early-connection.ts';
import { fakeDaemons, quick } from './fake-daemons.ts';
import { identifyFake } from './fake-fleet.ts';
import { resolveLimits } from './limits.ts';

const purpose = 'viper-memory/1';

async function connecting(daemons: Awaited<ReturnType<typeof fakeDaemons>>, limits = quick) {
  const credentials = await daemons.fleet.issue('a');
  const { url } = daemons.path;
  const target = { url, purpose, credentials, identify: identifyFake, expectCloudletId: 'b' } as const;
  return new EarlyConnection(target, resolveLimits(limits));
}

test('a session goes over the connection that waited for it, and over another one when that is gone', async () => {
  await using daemons = await fakeDaemons();
  const early = await connecting(daemons);
  await daemons.until(() => daemons.link.receptionCount === 1, 'the connection waits at the server');
  const { client, server } = await daemons.pair({ early });
  assert.equal(daemons.link.receptionCount, 0);
  client.end('hello');
  assert.deepEqual(await server.take(1).toArray(), [Buffer.from('hello')]);
  assert.equal(await early.take(), undefined);
  const again = await daemons.pair({ early });
  assert.notEqual(again.client.id, client.id);
});

test('one that nobody takes, or that waits for too long, is given up', async () => {
  await using daemons = await fakeDaemons();
  const unwanted = await connecting(daemons);
  const late = await connecting(daemons, { ...quick, helloTimeoutMs: 20 });
  await daemons.until(() => daemons.link.receptionCount === 2, 'both wait at the server');
  unwanted[Symbol.dispose]();
  await daemons.until(() => daemons.link.receptionCount === 0, 'both are gone from the server');
  assert.equal(await late.take(), undefined);
});
