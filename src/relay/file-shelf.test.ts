import assert from 'node:assert/strict';
import { mkdtempSync, readdirSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { duplexPair } from 'node:stream';
import { type TestContext, test } from 'node:test';
import { MiB } from '../model/units.ts';
import { FileShelf } from './file-shelf.ts';
import { RelayClient } from './relay-client.ts';
import { serveSlabs } from './serve-slabs.ts';
import { SlabStore } from './slab-store.ts';

function open(context: TestContext, quotaBytes = MiB) {
  const directory = mkdtempSync(path.join(tmpdir(), 'viper-shelf-'));
  context.after(() => rmSync(directory, { recursive: true, force: true }));
  const shelf = new FileShelf(path.join(directory, 'relay'));
  const store = new SlabStore({ shelf, quotaBytes, availableBytes: () => 2 ** 40, now: () => 0 });
  context.after(() => {
    for (const group of store.groups().keys()) store.drop(group);
  });
  const files = () => readdirSync(directory, { recursive: true, encoding: 'utf8' }).toSorted();
  return { directory, store, files };
}

test('slabs come back out of files that nobody else reads, and go with their group', async (context) => {
  const { directory, store, files } = open(context);
  for (const group of ['a', 'b']) store.attach(group, 1000);
  const puts = [1, 2, 3].flatMap((slab) => [
    store.put('a', slab, Buffer.alloc(1000, slab)),
    store.put('b', slab, Buffer.alloc(2000, 10 * slab)),
  ]);
  assert.deepEqual(new Set(await Promise.all(puts)), new Set([true]));
  assert.deepEqual(await store.get('a', 2), Buffer.alloc(1000, 2));
  assert.deepEqual(await store.get('b', 3), Buffer.alloc(2000, 30));
  assert.equal(store.get('a', 4), undefined);
  assert.deepEqual(files(), ['relay', 'relay/a', 'relay/b']);
  assert.equal(statSync(path.join(directory, 'relay/a')).mode & 0o777, 0o600);
  store.drop('a');
  while (files().length > 2) await new Promise(setImmediate);
  assert.deepEqual(files(), ['relay', 'relay/b']);
  assert.deepEqual(await store.get('b', 1), Buffer.alloc(2000, 10));
});

test('what an earlier daemon has left goes', (context) => {
  const { directory, store } = open(context);
  store.attach('a', 1000);
  writeFileSync(path.join(directory, 'left'), '');
  new FileShelf(directory);
  assert.throws(() => readdirSync(directory), { code: 'ENOENT' });
});

test('room is taken when a slab comes, given back when it cannot be kept, and nothing is kept of a group that goes', async (context) => {
  const { directory, store } = open(context, 100_000);
  store.attach('a', 1000);
  // Side by side, of which one has no room.
  const puts = [1, 2, 3].map((slab) => store.put('a', slab, Buffer.alloc(40_000)));
  assert.deepEqual(await Promise.all(puts), [true, true, false]);
  assert.equal(await store.put('a', 1, Buffer.alloc(5)), true);
  const late = store.put('a', 4, Buffer.alloc(1000));
  store.drop('a');
  assert.equal(await late, false);
  assert.equal(store.usedBytes, 0);
  rmSync(path.join(directory, 'relay'), { recursive: true, force: true });
  writeFileSync(path.join(directory, 'relay'), 'in the way');
  store.attach('b', 1000);
  assert.equal(await store.put('b', 1, Buffer.alloc(1000)), false);
  assert.equal(store.usedBytes, 0);
});

test('what is taken out of a file, or came twice, counts as long as the file is there', async (context) => {
  const { directory, store, files } = open(context, 10_000);
  store.attach('a', 1000);
  const twice = [1, 1].map((slab) => store.put('a', slab, Buffer.alloc(2000)));
  assert.deepEqual(await Promise.all(twice), [true, true]);
  let taken = 0;
  while (await store.put('a', 2, Buffer.alloc(2000))) {
    store.remove('a', 2);
    taken += 1;
    assert.ok(taken < 10, 'it has no end');
  }
  assert.equal(taken, 2);
  const { size } = statSync(path.join(directory, 'relay/a'));
  assert.ok(size <= store.usedBytes && store.usedBytes <= 10_000, `${size} bytes in the file`);
  assert.equal(store.groups().get('a')?.bytes, store.usedBytes);
  store.remove('a', 1);
  // Nothing is left to wait for a lease.
  store.detach('a');
  assert.equal(store.usedBytes, 0);
  while (files().length > 1) await new Promise(setImmediate);
});

test('a session over files puts, expects and gets as one over memory', async (context) => {
  const { store } = open(context);
  store.attach('a', 1000);
  const [near, far] = duplexPair();
  const serving = serveSlabs({ store, group: 'a', session: far });
  const client = new RelayClient(near);
  assert.equal(await client.put(7, Buffer.alloc(5000, 7)), true);
  assert.equal(await client.expect(7, Buffer.alloc(32), 5000), false, 'another content');
  assert.equal(await client.get(7, { at: 0, length: 10 }), undefined);
  assert.equal(await client.put(8, Buffer.alloc(5000, 8)), true);
  assert.deepEqual(await client.get(8, { at: 100, length: 10 }), Buffer.alloc(10, 8));
  client.close();
  await serving;
});
