import assert from 'node:assert/strict';
import { test } from 'node:test';
import type { FastifyBaseLogger } from 'fastify';
import { testFounder, testMember, testServer } from '../fleet/fixtures.ts';
import { asPeer } from '../fleet/index.ts';
import { EventLog } from './events.ts';
import { Fleet } from './fleet.ts';
import { testStore } from './store/fixtures.ts';

test('a cloudlet that closes while it asks its fleet does not wait for the next time', {
  timeout: 20_000,
}, async () => {
  await using founder = await testFounder();
  await using member = await testMember(founder, 'member');
  const asked = Promise.withResolvers<void>();
  await using server = await testServer(founder.identity.tls, () => {
    asked.resolve();
    return new Promise(() => {});
  });
  using fixture = testStore();
  const { store } = fixture;
  const fleet = new Fleet({
    identity: member.identity,
    store,
    events: new EventLog(store),
    log: { warn: () => {} } as unknown as FastifyBaseLogger,
    onRenewed: () => assert.fail('nothing is due'),
  });
  fleet.directory.merge([{ ...asPeer(founder.identity), url: server.url }], Date.now());
  fleet.start();
  await asked.promise;
  await fleet.close();
});
