import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { duplexPair } from 'node:stream';
import { type TestContext, test } from 'node:test';
import type { Session } from '../../link/index.ts';
import { newId } from '../../model/ids.ts';
import { MiB } from '../../model/units.ts';
import { RelayClient } from '../../relay/index.ts';
import { EventLog } from '../events.ts';
import { testStore } from '../store/fixtures.ts';
import { RelayService } from './service.ts';

const group = 'ab'.repeat(32);
const migrationId = newId();
const hello = { migrationId, group, leaseS: 0 };

function open(context: TestContext, more: { memoryBytes?: number; isDraining?: () => boolean } = {}) {
  const fixture = testStore();
  context.after(() => fixture[Symbol.dispose]());
  const { store } = fixture;
  const events = new EventLog(store);
  const directory = mkdtempSync(path.join(tmpdir(), 'viper-relay-'));
  context.after(() => rmSync(directory, { recursive: true, force: true }));
  const make = () => {
    const service = new RelayService({
      store,
      events,
      configured: { memory: more.memoryBytes ?? 0, disk: 0 },
      directory: path.join(directory, 'relay'),
      reserveBytes: 0,
      nameOf: () => 'edge1',
      openRelay: () => Promise.reject(new Error('alone')),
      availableBytes: () => 2 ** 40,
      isDraining: more.isDraining ?? (() => false),
    });
    context.after(() => service.close());
    return service;
  };
  const kinds = () => store.events.since(0, 100).map(({ kind }) => kind);
  return { make, kinds };
}

function connect(service: RelayService, request = hello as Record<string, unknown>) {
  const accepted = service.accept({ purpose: 'viper-relay/1', cloudletId: newId(), hello: request as never });
  const [near, far] = duplexPair();
  accepted.onSession(far as unknown as Session);
  return { client: new RelayClient(near), near };
}

test('memory is lent when an operator says so, also after a restart, until he says otherwise', async (context) => {
  const { make, kinds } = open(context);
  const service = make();
  assert.throws(
    () => service.accept({ purpose: 'viper-relay/1', cloudletId: newId(), hello }),
    /lends no memory/,
  );
  assert.equal(service.lend({ memoryBytes: 64 * MiB }).freeBytes, 64 * MiB);
  assert.equal(make().status.memoryBytes, 64 * MiB);
  const { client, near } = connect(service);
  assert.equal(await client.put(1, Buffer.alloc(1000)), true);
  const [held] = service.status.migrations;
  assert.deepEqual([held?.migrationId, held?.cloudlet, held?.slabs], [migrationId, 'edge1', 1]);
  service.lend({ memoryBytes: 0 });
  assert.equal(await client.put(2, Buffer.alloc(1000)), false);
  assert.equal((await client.get(1, { at: 0, length: 1000 }))?.length, 1000, 'what is held stays');
  client.drop();
  assert.equal(await client.get(1, { at: 0, length: 1000 }), undefined);
  near.end();
  while (service.status.migrations.length > 0) await new Promise(setImmediate);
  assert.deepEqual(kinds(), ['relay.on', 'relay.lends', 'relay.off', 'relay.forgot']);
});

test('who says that it shares hears that it may, and an older client what it has always heard', async (context) => {
  const service = open(context, { memoryBytes: MiB }).make();
  for (const [shares, expected] of [
    [1, true],
    [undefined, false],
  ] as const) {
    const { client, near } = connect(service, { ...hello, ...(shares && { shares }) });
    await client.get(1, { at: 0, length: 1 });
    assert.equal(client.canShare, expected);
    near.end();
  }
});

test('a cloudlet that is drained lends nothing', (context) => {
  const service = open(context, { memoryBytes: MiB, isDraining: () => true }).make();
  assert.equal(service.status.freeBytes, 0);
  assert.throws(
    () => service.accept({ purpose: 'viper-relay/1', cloudletId: newId(), hello }),
    /lends no memory/,
  );
});

test('a session that says nothing of a migration is none', (context) => {
  const service = open(context, { memoryBytes: MiB }).make();
  const wrong = [
    {},
    { ...hello, group: 'short' },
    { ...hello, migrationId: '../x' },
    { ...hello, leaseS: 'long' },
  ];
  for (const one of wrong)
    assert.throws(() => connect(service, one), /This is no session of a relay/, JSON.stringify(one));
});
