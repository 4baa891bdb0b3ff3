import assert from 'node:assert/strict';
import { randomInt } from 'node:crypto';
import { test } from 'node:test';
import { MiB } from '../model/units.ts';
import { longestLeaseMs, memoryShelf, SlabStore } from './slab-store.ts';

const plenty = 2 ** 40;
let now = 0;
const open = (quotaBytes: number, available = plenty) =>
  new SlabStore({ shelf: memoryShelf, quotaBytes, availableBytes: () => available, now: () => now });

test('slabs come back as they were given, each group its own', () => {
  const store = open(MiB);
  for (const group of ['a', 'b']) {
    store.attach(group, 1000);
    assert.ok(store.put(group, 1, Buffer.from(`${group}1`)));
  }
  assert.equal(store.get('a', 1)?.toString(), 'a1');
  assert.equal(store.get('b', 1)?.toString(), 'b1');
  assert.equal(store.get('a', 2), undefined);
  assert.equal(store.get('c', 1), undefined);
  assert.ok(store.put('a', 1, Buffer.from('other')));
  assert.equal(store.get('a', 1)?.toString(), 'a1', 'the first content of a number stays');
});

test('what was given may be changed afterwards by its owner', () => {
  const store = open(MiB);
  store.attach('a', 1000);
  const bytes = Buffer.from('as it was');
  store.put('a', 1, bytes);
  bytes.fill(0);
  assert.equal(store.get('a', 1)?.toString(), 'as it was');
});

test('it holds no more than its quota, nor than its host has left, and takes again what was dropped', () => {
  const store = open(MiB);
  store.attach('a', 1000);
  let taken = 0;
  while (store.put('a', taken + 1, Buffer.alloc(100_000))) taken += 1;
  assert.equal(taken, 10);
  assert.ok(store.usedBytes <= MiB);
  store.setQuota(1000);
  assert.equal(store.freeBytes, 0);
  assert.equal(store.get('a', 10)?.length, 100_000, 'what is held stays');
  store.drop('a');
  assert.equal(store.usedBytes, 0);
  assert.equal(store.freeBytes, 1000);
  assert.equal(open(MiB, 256 * MiB + 5).freeBytes, 5);
});

test('a group is forgotten when its lease has ended after its last session, and not before', () => {
  const store = open(MiB);
  now = 0;
  store.attach('a', 1000);
  store.attach('a', 500);
  store.put('a', 1, Buffer.from('x'));
  now = 5000;
  assert.deepEqual(store.expire(), []);
  store.detach('a');
  assert.deepEqual(store.expire(), []);
  store.detach('a');
  now = 5999;
  assert.deepEqual(store.expire(), []);
  now = 6000;
  assert.deepEqual(store.expire(), ['a']);
  assert.equal(store.get('a', 1), undefined);
  assert.equal(store.usedBytes, 0);
});

test('nobody gets a longer lease than there is, and an empty group leaves nothing', () => {
  const store = open(MiB);
  now = 0;
  store.attach('a', 10 * longestLeaseMs);
  store.put('a', 1, Buffer.from('x'));
  store.detach('a');
  now = longestLeaseMs;
  assert.deepEqual(store.expire(), ['a']);
  store.attach('b', 1000);
  store.detach('b');
  assert.equal(store.groups().size, 0);
});

test('a group that is to be kept outlives its last session by the longest lease', () => {
  const store = open(MiB);
  now = 0;
  for (const group of ['a', 'b']) {
    store.attach(group, 1000);
    store.put(group, 1, Buffer.from('x'));
  }
  store.prolong('a');
  for (const group of ['a', 'b']) store.detach(group);
  now = longestLeaseMs - 1;
  assert.deepEqual(store.expire(), ['b']);
  now = longestLeaseMs;
  assert.deepEqual(store.expire(), ['a']);
});

test('what groups share is held as long as one of them has it, and counted once', () => {
  const store = open(MiB);
  now = 0;
  for (const group of ['a', 'b', 'c']) store.attach(group, 1000);
  store.put('a', 1, Buffer.alloc(900_000, 1));
  const { usedBytes } = store;
  assert.equal(store.share('b', 1, 'a'), true, 'though there would be no room for another one');
  assert.equal(store.share('b', 1, 'a'), true);
  assert.equal(store.share('c', 1, 'b'), true);
  store.drop('a');
  store.remove('c', 1);
  assert.equal(store.get('b', 1)?.[0], 1);
  assert.equal(store.usedBytes, usedBytes);
  store.detach('b');
  now = 1000;
  assert.deepEqual(store.expire(), ['b']);
  assert.equal(store.usedBytes, 0);
});

test('there is an end to the number of groups', () => {
  const store = open(MiB);
  let groups = 0;
  while (groups < 10_000 && store.attach(String(groups), 1000)) groups += 1;
  assert.equal(groups, 256);
  assert.equal(store.put('one more', 1, Buffer.from('x')), false);
});

test('whatever is put, dropped and left: the bytes add up and the quota holds', () => {
  const store = open(50_000);
  const groups = ['0', '1', '2', '3', '4'];
  const slabs = Array.from({ length: 30 }, (_, index) => index + 1);
  const overheadBytes = 256;
  now = 0;
  for (let turn = 0; turn < 5000; turn++) {
    const group = String(randomInt(5));
    const what = randomInt(10);
    if (what === 0) store.attach(group, randomInt(2000));
    else if (what === 1 && (store.groups().get(group)?.sessions ?? 0) > 0) store.detach(group);
    else if (what === 2) store.drop(group);
    else if (what === 3) store.expire();
    else if (what === 4) store.share(group, 1 + randomInt(30), String(randomInt(5)));
    else store.put(group, 1 + randomInt(30), Buffer.alloc(1 + randomInt(8000)));
    now += randomInt(200);
    const held = new Set(
      groups.flatMap((each) =>
        slabs.map((slab) => store.get(each, slab)).filter((bytes) => bytes !== undefined),
      ),
    );
    const sum = [...held].reduce((total, { length }) => total + length + overheadBytes, 0);
    assert.equal(sum, store.usedBytes);
    assert.ok(store.usedBytes <= 50_000 && store.freeBytes >= 0);
  }
});
