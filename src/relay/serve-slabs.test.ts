import assert from 'node:assert/strict';
import { duplexPair } from 'node:stream';
import { test } from 'node:test';
import { newId } from '../model/ids.ts';
import type { PassOn } from './pass-on.ts';
import { RelayClient } from './relay-client.ts';
import { type ServedStore, serveSlabs } from './serve-slabs.ts';

/** All slabs are there, and reading one takes until `read` resolves. */
function start(read: Promise<Buffer>) {
  const counts = { reads: 0, removed: 0 };
  const store: ServedStore = {
    freeBytes: 1,
    put: () => true,
    get: () => {
      counts.reads += 1;
      return read;
    },
    drop: () => {},
    prolong: () => {},
    share: () => false,
    whenHeld: (_group, _slab, onHeld) => {
      onHeld();
      return () => {};
    },
    remove: () => {
      counts.removed += 1;
    },
  };
  const passOn = { pass: async () => true, close: () => {} } as unknown as PassOn;
  const [near, far] = duplexPair();
  const served = serveSlabs({ store, group: 'a', session: far, passOn });
  served.catch(() => {});
  return { client: new RelayClient(near), near, served, counts };
}

const slabs = Array.from({ length: 500 }, (_, index) => index + 1);

test('who asks for much at once does not have all of it read into memory at once, and is answered all the same', async () => {
  const read = Promise.withResolvers<Buffer>();
  const { client, counts } = start(read.promise);
  const to = newId();
  const passed = slabs.map((slab) => client.pass(slab, to, 1));
  const expected = slabs.map((slab) => client.expect(slab, Buffer.alloc(32), 1));
  await client.put(1, Buffer.alloc(1));
  assert.ok(counts.reads >= 2 && counts.reads <= 100, `${counts.reads} at once`);
  read.resolve(Buffer.alloc(10));
  assert.deepEqual(new Set(await Promise.all(passed)), new Set([true]));
  assert.deepEqual(new Set(await Promise.all(expected)), new Set([false]));
  assert.deepEqual(counts, { reads: 1000, removed: 500 });
});

test('what waits for its turn when the session ends is not read any more', async () => {
  const read = Promise.withResolvers<Buffer>();
  const { client, near, served, counts } = start(read.promise);
  const to = newId();
  for (const slab of slabs) client.pass(slab, to, 1).catch(() => {});
  await client.put(1, Buffer.alloc(1));
  const { reads } = counts;
  near.destroy(new Error('cut'));
  await served.catch(() => {});
  read.resolve(Buffer.alloc(10));
  await new Promise(setImmediate);
  assert.equal(counts.reads, reads);
});

test('who asks for more than anybody could take has no session any more', async () => {
  const { client, served } = start(new Promise(() => {}));
  for (let slab = 1; slab <= 9000; slab++) client.pass(slab, newId(), 1).catch(() => {});
  await assert.rejects(served, /more to give on than it may/);
});
