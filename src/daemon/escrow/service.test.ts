import assert from 'node:assert/strict';
import { mkdirSync, readdirSync } from 'node:fs';
import { duplexPair } from 'node:stream';
import { type TestContext, test } from 'node:test';
import type { Session } from '../../link/index.ts';
import { encodeEscrow } from '../../migration/relayed/escrow.ts';
import { Manifest } from '../../migration/relayed/manifest.ts';
import { newId, type Uuid } from '../../model/ids.ts';
import type { VmToMove } from '../../model/migration.ts';
import { newKey } from '../../relay/index.ts';
import { BlockTable } from '../../stream/index.ts';
import type { Principal } from '../credentials.ts';
import { EventLog } from '../events.ts';
import { Operations } from '../operations.ts';
import { statePaths } from '../paths.ts';
import { testImage, testStore, testVm } from '../store/fixtures.ts';
import { EscrowService, type EscrowServiceOptions } from './service.ts';

const cloudletId = newId();
const south = { id: newId(), name: 'south', url: 'https://south' };
const caller: Principal = { kind: 'cloudlet', cloudletId: south.id, name: 'south', scopes: ['peer'] };
const operator: Principal = { kind: 'credential', credentialId: newId(), name: 'ann', scopes: ['admin'] };
const body = { vm: 'web', reason: 'south burnt down' };

function vmToMove(): VmToMove {
  const { id, name, spec } = testVm('web');
  const { digest, format, fileBytes, virtualBytes } = testImage();
  const image = { digest, format, fileBytes, virtualBytes };
  return { id, name, spec, running: true, epoch: 1, runningWith: 'tcg', image, diskBytes: 0 };
}

function escrowBytes(migrationId: Uuid, relays = [newId(), newId()]): Buffer {
  const division = { migrationId, key: newKey(), group: 'ab'.repeat(32), relays, replicas: 2, partPages: 8 };
  const table = new BlockTable([{ name: 'pc.ram', sizeBytes: 4096 * 64 }]);
  const manifest = new Manifest(division, { sectionId: 2, table });
  manifest.addZeroes([[0, 64]]);
  const facts = Buffer.from(JSON.stringify({ vm: vmToMove(), epoch: 2, diskMark: `viper-${migrationId}` }));
  return encodeEscrow({
    facts,
    manifest: manifest.toBytes(),
    whole: { opening: Buffer.alloc(8), tail: Buffer.alloc(8) },
  });
}

function open(context: TestContext, { isReached = false } = {}) {
  const fixture = testStore();
  context.after(() => fixture[Symbol.dispose]());
  const { store, directory } = fixture;
  const paths = statePaths(directory);
  mkdirSync(paths.escrows);
  const events = new EventLog(store);
  const operations = new Operations({ store, events, onBug: (error) => assert.fail(error) });
  const answer = () => (isReached ? Promise.resolve() : Promise.reject(new Error('away')));
  const parts: Partial<Record<keyof EscrowServiceOptions, unknown>> = {
    cloudletId,
    store,
    events,
    operations,
    paths,
    fleet: { peers: () => [south], client: { fetch: answer } },
    log: { warn() {} },
    // As far as a claim comes here.
    fit: async () => ({ problems: [{ message: 'no room' }] }),
    peers: { limits: { forget() {} } },
  };
  const service = new EscrowService(parts as EscrowServiceOptions);
  /** Whether it is held. */
  const deposit = async (migrationId: Uuid, bytes: Buffer, by: Uuid = south.id): Promise<boolean> => {
    const request = { purpose: 'viper-escrow/1', cloudletId: by, hello: { migrationId } } as const;
    const [near, far] = duplexPair();
    near.on('error', () => {});
    service.accept(request).onSession(far as unknown as Session);
    near.end(bytes);
    near.resume();
    const { promise, resolve } = Promise.withResolvers<boolean>();
    near.on('end', () => resolve(true));
    far.on('error', () => resolve(false));
    return promise;
  };
  const kinds = () => store.events.since(0, 100).map(({ kind }) => kind);
  return { service, deposit, kinds, operations, files: () => readdirSync(paths.escrows) };
}

test('what a destination leaves is held until it takes it back, and a deposit that is late does not bring it back', async (context) => {
  const { service, deposit, kinds, files } = open(context);
  const [one, two] = [newId(), newId()];
  assert.equal(await deposit(one, escrowBytes(one)), true);
  const [held] = service.list().items;
  assert.deepEqual([held?.migrationId, held?.from.name, held?.state], [one, 'south', 'held']);
  assert.deepEqual(files(), [one]);
  assert.deepEqual(service.owner(one, false, caller), { claimed: false });
  assert.deepEqual(await service.release(one, caller), { claimed: false });
  assert.deepEqual([service.list().items, files()], [[], []]);
  await service.release(two, caller);
  for (const each of [one, two]) {
    assert.equal(await deposit(each, escrowBytes(each)), false);
    await assert.rejects(service.claim(each, body, operator), { code: 'not_found' });
  }
  assert.deepEqual([service.list().items, files()], [[], []]);
  assert.deepEqual(kinds(), ['escrow.held', 'escrow.released', 'escrow.released']);
});

test('it is for its destination alone, and no relay has the key to what it holds', async (context) => {
  const { service, deposit } = open(context);
  const id = newId();
  assert.equal(await deposit(id, escrowBytes(id, [newId(), cloudletId])), false);
  assert.equal(await deposit(id, escrowBytes(newId())), false, 'of another migration');
  assert.equal(await deposit(id, Buffer.alloc(100)), false);
  assert.equal(await deposit(id, escrowBytes(id)), true);
  const other: Principal = { ...caller, cloudletId: newId() };
  assert.throws(() => service.owner(id, false, other), { code: 'forbidden' });
  await assert.rejects(service.release(id, other), { code: 'forbidden' });
  assert.equal(await deposit(id, escrowBytes(id), newId()), false);
});

test('nobody claims a VM whose destination answers, or has just asked, unless it says that the VM has ended', async (context) => {
  const id = newId();
  for (const [isReached, hasAsked, isGone, isRefused] of [
    [true, false, false, true],
    [false, true, false, true],
    [true, true, true, false],
    [false, false, false, false],
  ] as const) {
    const { service, deposit, operations } = open(context, { isReached });
    await deposit(id, escrowBytes(id));
    if (hasAsked) service.owner(id, isGone, caller);
    const claim = service.claim(id, body, operator);
    if (isRefused) {
      await assert.rejects(
        claim,
        isReached ? /: the daemon at south answers/ : /: south asked for it a moment ago/,
      );
      continue;
    }
    const ended = await operations.wait((await claim).id);
    assert.equal(ended.error?.code, 'migration_refused');
    // It may be tried again, and the destination may still have it.
    assert.equal(service.list().items[0]?.state, 'held');
    await assert.rejects(service.claim(id, { ...body, vm: 'db' }, operator), { code: 'not_found' });
    assert.equal((await operations.wait((await service.claim(id, body, operator)).id)).state, 'failed');
    assert.deepEqual(await service.release(id, caller), { claimed: false });
  }
});
