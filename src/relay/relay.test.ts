/** A client and a relay over one stream, and what sealing keeps from a relay. */
import assert from 'node:assert/strict';
import { hash, randomBytes } from 'node:crypto';
import { Duplex, duplexPair } from 'node:stream';
import { test } from 'node:test';
import { newId } from '../model/ids.ts';
import { MiB } from '../model/units.ts';
import { memoryShelf, newKey, PassOn, RelayClient, Seal, SlabStore, serveSlabs } from './index.ts';

function start(quotaBytes = 16 * MiB) {
  const store = new SlabStore({
    shelf: memoryShelf,
    quotaBytes,
    availableBytes: () => 2 ** 40,
    now: () => 0,
  });
  store.attach('group', 1000);
  const [near, far] = duplexPair();
  const served = serveSlabs({ store, group: 'group', session: far });
  served.catch(() => {});
  return { store, client: new RelayClient(near), near, far, served };
}

test('slabs are put and got, in any order, and dropped', async () => {
  const { store, client, served } = start();
  const slabs = Array.from({ length: 20 }, () => randomBytes(50_000));
  const held = await Promise.all(slabs.map((bytes, index) => client.put(index + 1, bytes)));
  assert.deepEqual(new Set(held), new Set([true]));
  assert.equal(client.inFlightBytes, 0);
  assert.equal(client.freeBytes, store.freeBytes);
  const got = await Promise.all(
    slabs.map((_, index) => client.get(index + 1, { at: 0, length: 50_000, urgent: index % 3 === 0 })),
  );
  for (const [index, bytes] of got.entries()) assert.ok(bytes?.equals(slabs[index]!), `slab ${index + 1}`);
  assert.equal(await client.get(99, { at: 0, length: 1 }), undefined);
  const [part] = [await client.get(3, { at: 100, length: 50 })];
  assert.ok(part?.equals(slabs[2]!.subarray(100, 150)));
  assert.equal(await client.get(3, { at: 49_999, length: 2 }), undefined, 'longer than it is');
  client.drop();
  assert.equal(await client.get(1, { at: 0, length: 1 }), undefined);
  client.close();
  await served;
});

test('a slab of one group is shared by another that shows its secret, and stays when the first one goes', async () => {
  const store = new SlabStore({
    shelf: memoryShelf,
    quotaBytes: 16 * MiB,
    availableBytes: () => 2 ** 40,
    now: () => 0,
  });
  const [first, second] = ['aa', 'bb'].map((each) => each.repeat(32)) as [string, string];
  const connect = (secret: string) => {
    const nameOf = (each: string) => `group ${each}`;
    store.attach(nameOf(secret), 1000);
    const [near, far] = duplexPair();
    serveSlabs({ store, group: nameOf(secret), session: far, nameOf }).catch(() => {});
    return new RelayClient(near);
  };
  const [one, other] = [connect(first), connect(second)];
  const bytes = randomBytes(50_000);
  assert.equal(await one.put(1, bytes), true);
  const { usedBytes } = store;
  const range = { at: 0, length: bytes.length };
  assert.equal(await other.get(1, range), undefined, 'not before it is shared');
  assert.equal(other.canShare, true);
  assert.equal(await other.share(1, 'cc'.repeat(32)), false, 'a group that nobody knows');
  assert.equal(await other.share(2, first), false, 'a slab that it does not have');
  assert.equal(await other.share(1, first), true);
  assert.equal(store.usedBytes, usedBytes, 'it takes its room once');
  one.drop();
  assert.equal(await one.get(1, range), undefined);
  assert.ok((await other.get(1, range))?.equals(bytes));
  assert.equal(await one.share(1, second), false, 'a group that was dropped takes nothing any more');
});

test('a relay that is full says so, and goes on with what it has', async () => {
  const { client } = start(100_000);
  assert.equal(await client.put(1, randomBytes(60_000)), true);
  assert.equal(await client.put(2, randomBytes(60_000)), false);
  assert.ok(client.freeBytes < 60_000);
  assert.equal((await client.get(1, { at: 0, length: 60_000 }))?.length, 60_000);
});

test('what a guest waits for goes before what nobody waits for', async () => {
  const { client } = start();
  for (let slab = 1; slab <= 30; slab++) await client.put(slab, randomBytes(60_000));
  const order: number[] = [];
  const asked = Array.from({ length: 29 }, (_, index) =>
    client.get(index + 1, { at: 0, length: 60_000 }).then(() => order.push(index + 1)),
  );
  asked.push(client.get(30, { at: 0, length: 60_000, urgent: true }).then(() => order.push(30)));
  await Promise.all(asked);
  // What was on its way already is not overtaken.
  assert.ok(order.indexOf(30) < 15, order.join(' '));
});

/** A relay, and what it has for those who come for its group. */
function relay(passOn?: PassOn) {
  const store = new SlabStore({
    shelf: memoryShelf,
    quotaBytes: 16 * MiB,
    availableBytes: () => 2 ** 40,
    now: () => 0,
  });
  const open = () => {
    store.attach('group', 1000);
    const [near, far] = duplexPair();
    serveSlabs({ store, group: 'group', session: far, passOn }).catch(() => {});
    return near;
  };
  return { store, open };
}

test('a relay gives on what it has, and whoever expects it there hears of it from the one that has it', async () => {
  const [other, full] = [relay(), start(1000)];
  const [otherId, fullId] = [newId(), newId()];
  const passOn = new PassOn(async (to) => {
    if (to === otherId) return other.open();
    if (to === fullId) return full.near;
    throw new Error('unknown');
  });
  const first = new RelayClient(relay(passOn).open());
  const there = new RelayClient(other.open());
  const bytes = randomBytes(50_000);
  const expected = there.expect(1, hash('sha256', bytes, 'buffer'), bytes.length);
  assert.equal(there.expectedBytes, bytes.length);
  assert.equal(await first.put(1, bytes), true);
  assert.equal(await first.pass(1, otherId, bytes.length), true);
  assert.equal(await expected, true);
  assert.deepEqual([there.expectedBytes, first.passingBytes], [0, 0]);
  assert.ok((await there.get(1, { at: 0, length: bytes.length }))?.equals(bytes));
  assert.equal(await there.expect(1, hash('sha256', bytes, 'buffer'), 1), true, 'it is there already');
  assert.equal(await first.pass(2, otherId, 1), false, 'a slab that it does not have');
  assert.equal(await first.pass(1, fullId, 1), false, 'a relay that is full');
  assert.equal(await first.pass(1, newId(), 1), false, 'a relay that nobody knows');
});

test('what was given on and is not what was expected is dropped', async () => {
  const { client, store } = start();
  const [right, wrong] = [randomBytes(1000), randomBytes(1000)];
  const expected = client.expect(1, hash('sha256', right, 'buffer'), right.length);
  store.put('group', 1, wrong);
  assert.equal(await expected, false);
  assert.equal(store.usedBytes, 0);
  assert.equal(await client.put(1, right), true);
  assert.ok((await client.get(1, { at: 0, length: 1000 }))?.equals(right));
});

test('nobody waits any more for what is expected in a session that ends', async () => {
  const { client, near, served } = start();
  const expected = client.expect(1, Buffer.alloc(32), 1);
  near.destroy(new Error('cut'));
  await assert.rejects(expected, /cut/);
  await served.catch(() => {});
});

test('when the session breaks, everybody who waits hears of it', async () => {
  const { client, near } = start();
  const stuck = new RelayClient(
    new Duplex({
      read() {},
      write(_bytes, _encoding, done) {
        done();
      },
    }),
  );
  assert.ok(stuck.isAlive);
  const got = client.get(1, { at: 0, length: 1 });
  near.destroy(new Error('cut'));
  await assert.rejects(got, /cut/);
  await assert.rejects(client.put(1, Buffer.alloc(9)), /cut/);
  assert.match((await client.gone).message, /cut/);
  assert.equal(client.isAlive, false);
});

test('a client that breaks the rules ends its session, and no other', async () => {
  const { near, served } = start();
  near.write(Buffer.of(9, 9, 9, 9, 9));
  await assert.rejects(served, /The other end of a relay/);
});

test('only the key opens a slab, only under its number, only in its migration', () => {
  const [key, id] = [newKey(), newId()];
  const seal = new Seal(key, id);
  const content = randomBytes(10_000);
  const sealed = seal.close(7, 2, [content.subarray(0, 5), content.subarray(5)]);
  assert.ok(seal.open(7, 2, sealed).equals(content));
  assert.equal(sealed.indexOf(content.subarray(100, 132)), -1);
  const others = {
    number: () => seal.open(8, 2, sealed),
    part: () => seal.open(7, 1, sealed),
    key: () => new Seal(newKey(), id).open(7, 2, sealed),
  };
  for (const [what, open] of Object.entries(others)) assert.throws(open, /is not what was given/, what);
  assert.throws(() => new Seal(key, newId()).open(7, 2, sealed), /is not what was given/);
  for (const at of [0, 5000, sealed.length - 1]) {
    const changed = Buffer.from(sealed);
    changed[at]! ^= 1;
    assert.throws(() => seal.open(7, 2, changed), /is not what was given/, `byte ${at}`);
  }
  for (const length of [0, 5, 16, sealed.length - 1])
    assert.throws(
      () => seal.open(7, 2, sealed.subarray(0, length)),
      /is not what was given/,
      `${length} bytes`,
    );
});
