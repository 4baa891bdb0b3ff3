/** Dividers that share a pool, with relays between them; what the destination is told is read as it would. */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { type TestContext, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { newId } from '../../model/ids.ts';
import { BlockTable } from '../../stream/index.ts';
import { FrameReader, frame } from '../condensed/frames.ts';
import { Divider } from './divider.ts';
import { parseAlike, parseBorrowed, parseDivision, parseSlab, type Run } from './division.ts';
import { endsOf, type FakeRelay, fakeRelays } from './fake-relay.ts';
import { Manifest } from './manifest.ts';
import { Pool } from './pool.ts';
import { Pools } from './pools.ts';

const pages = 100;
const digests = Array.from({ length: pages }, () => randomBytes(32));

async function member(context: TestContext, relays: readonly FakeRelay[], pool: Pool, patienceMs = 5000) {
  const divider = new Divider({
    migrationId: newId(),
    relays: endsOf(relays),
    replicas: 2,
    pool,
    patienceMs,
  });
  context.after(() => divider.end({ drop: true }));
  await divider.open();
  const reader = new FrameReader();
  const returned: number[] = [];
  let manifest: Manifest | undefined;
  const hear = (type: number, body: Buffer) => {
    if (type === frame.division)
      manifest = new Manifest(parseDivision(body), {
        sectionId: 2,
        table: new BlockTable([{ name: 'pc.ram', sizeBytes: pages * 4096 }]),
      });
    if (type === frame.slab) manifest!.add(parseSlab(body, pages, manifest!.division));
    if (type === frame.borrowed) manifest!.add(parseBorrowed(body, manifest!.division));
    if (type === frame.alike) manifest!.addAlike(parseAlike(body, pages));
  };
  divider.begin({
    tell: (bytes) => {
      reader.push(bytes);
      for (let next = reader.next(); next; next = reader.next()) hear(next.type, next.body);
    },
    giveBack: (runs) => {
      for (const [first, count] of runs)
        for (let page = first; page < first + count; page++) returned.push(page);
    },
    wake: () => {},
  });
  return {
    divider,
    returned,
    manifest: manifest!,
    /** Page `page` has content `content`; gives whether it is in a slab already. */
    add(page: number, content: number, making: Promise<unknown> = Promise.resolve()): boolean {
      let isKnown = false;
      divider.add(
        async (slab) => {
          const found = divider.like(digests[content]!, slab, page);
          isKnown = found !== undefined;
          const runs: Run[] = found ? [] : [[page, 1]];
          const alike = found ? [{ page, slab: found.slab, like: found.page }] : [];
          if (!found) await making;
          return { parts: found ? [] : [[randomBytes(1000)]], runs, alike };
        },
        [[page, 1]],
      );
      return isKnown;
    },
    settled: () => until(() => divider.isSettled),
  };
}

async function until(condition: () => boolean): Promise<void> {
  for (const deadline = Date.now() + 10_000; !condition(); await sleep(2))
    assert.ok(Date.now() < deadline, 'waited in vain');
}

const slabsOf = (relay: FakeRelay, group: string) => relay.store.groups().get(group)?.slabs ?? 0;

test('a page is like one that another VM has put there, or is about to; each holds what it refers to', async (context) => {
  const relays = fakeRelays([{}, {}, {}]);
  const pool = new Pool(newId());
  const [one, other] = [await member(context, relays, pool), await member(context, relays, pool)];
  const making = Promise.withResolvers<void>();
  assert.equal(one.add(5, 1, making.promise), false);
  assert.equal(other.add(7, 1), true, 'though it is in the making');
  assert.equal(other.add(8, 2), false);
  assert.equal(one.add(9, 2), true);
  assert.equal(other.divider.isSettled, false);
  making.resolve();
  await Promise.all([one.settled(), other.settled()]);
  assert.deepEqual([one.returned, other.returned], [[], []]);
  const { slab, page } = other.manifest.whereIs(7)!;
  assert.deepEqual([slab.isBorrowed, page, slab.holders.length], [true, 5, 2]);
  assert.ok(other.manifest.covers(8) && one.manifest.covers(9) && one.manifest.covers(5));
  assert.equal(other.divider.sentBytes, one.divider.sentBytes, 'one slab each');
  assert.equal(other.divider.statistics.borrowedPages, 1);
  assert.notEqual(one.manifest.division.group, other.manifest.division.group);
  // It was not moved after all.
  one.divider.end({ drop: true });
  const { group, relays: ids } = other.manifest.division;
  await until(() => relays.every((relay) => slabsOf(relay, one.manifest.division.group) === 0));
  for (const holder of slab.holders) {
    const relay = relays.find(({ id }) => id === ids[holder])!;
    assert.ok(relay.store.get(group, slab.slab), 'it is held for the other');
  }
  assert.equal(other.add(10, 1), true, 'what it holds it may refer to again');
});

test('what is not there any more, or never comes, or not soon enough, is given back and goes by itself', async (context) => {
  const cases: Record<string, (one: Awaited<ReturnType<typeof member>>) => void> = {
    'was dropped': ({ divider }) => divider.end({ drop: true }),
    'never comes': ({ divider }) => divider.end({ drop: false }),
    'is late': () => {},
  };
  for (const [what, befalls] of Object.entries(cases)) {
    const relays = fakeRelays([{}, {}]);
    const pool = new Pool(newId());
    const [one, other] = [await member(context, relays, pool), await member(context, relays, pool, 200)];
    one.add(5, 1, new Promise(() => {}));
    assert.equal(other.add(7, 1), true);
    befalls(one);
    await other.settled();
    assert.deepEqual(other.returned, [7], what);
    assert.equal(other.add(7, 1), false, what);
    await other.settled();
    assert.equal(other.manifest.whereIs(7)?.slab.isBorrowed, undefined, what);
    assert.ok(other.manifest.covers(7), what);
  }
});

test('a slab that relays have forgotten is asked for once; of one who has left, nothing else is either', async (context) => {
  const relays = fakeRelays([{}, {}]);
  const pool = new Pool(newId());
  const [one, other] = [await member(context, relays, pool), await member(context, relays, pool)];
  for (const page of [1, 2, 3]) one.add(page, page);
  await one.settled();
  const { group } = one.manifest.division;
  const first = one.manifest.whereIs(1)!.slab.slab;
  for (const { store } of relays) store.remove(group, first);
  assert.equal(other.add(7, 1), true);
  await other.settled();
  assert.deepEqual(other.returned, [7]);
  const third = await member(context, relays, pool);
  assert.equal(third.add(4, 1), false, 'it is not asked for again');
  assert.equal(third.add(5, 2), true);
  await third.settled();
  // The VM has left, is whole, and its destination says so.
  one.divider.end({ drop: false });
  for (const { store } of relays) store.drop(group);
  assert.equal(other.add(8, 3), true);
  await other.settled();
  assert.deepEqual(other.returned, [7, 8]);
  assert.equal(other.add(9, 2), false);
});

test('a relay that is lost, or holds nothing of the other, is no replica', async (context) => {
  const relays = fakeRelays([{}, {}, {}]);
  const pool = new Pool(newId());
  const one = await member(context, relays.slice(0, 2), pool);
  const [other, elsewhere] = [
    await member(context, relays.slice(0, 2), pool),
    await member(context, relays.slice(1), pool),
  ];
  one.add(5, 1);
  await one.settled();
  assert.equal(elsewhere.add(7, 1), true);
  assert.equal(other.add(8, 1), true);
  await Promise.all([other.settled(), elsewhere.settled()]);
  assert.deepEqual([elsewhere.returned, other.returned], [[7], []]);
  relays[0]!.die();
  await until(() => other.returned.length > 0);
  assert.deepEqual(other.returned, [8]);
  assert.equal(other.divider.size, 0);
});

test('a relay that knows nothing of sharing is not asked for it, and keeps what it has', async (context) => {
  for (const wanted of [
    [{ isOld: true }, { isOld: true }],
    [{ isOld: true }, {}, {}],
  ]) {
    const relays = fakeRelays(wanted);
    const pool = new Pool(newId());
    const [one, other] = [await member(context, relays, pool), await member(context, relays, pool)];
    for (const page of [1, 2, 3, 4]) {
      one.add(page, page);
      await one.settled();
    }
    for (const page of [11, 12, 13, 14]) {
      other.add(page, page - 10);
      await other.settled();
    }
    for (const page of other.returned.splice(0)) assert.equal(other.add(page, page - 10), false);
    await other.settled();
    for (const page of [11, 12, 13, 14]) assert.ok(other.manifest.covers(page));
    assert.deepEqual([one.returned, one.divider.size, other.returned], [[], 4, []]);
  }
});

test('no number is given twice in a pool, and one that is empty is not used again', () => {
  const pools = new Pools();
  const [here, there] = [newId(), newId()];
  const pool = pools.of('ann', here)!;
  for (const group of ['a', 'b']) pool.join(group);
  assert.deepEqual([pool.begin('a'), pool.begin('b'), pool.begin('a'), pool.nextSlab], [1, 2, 3, 4]);
  assert.equal(pools.of('ann', here), pool);
  for (const [tenant, to] of [
    ['bob', here],
    ['ann', there],
    [undefined, here],
  ] as const)
    assert.notEqual(pools.of(tenant, to), pool);
  assert.equal(pools.of(undefined, here), undefined);
  pool.leave('a', { dropped: false });
  assert.equal(pools.of('ann', here), pool);
  pool.leave('b', { dropped: false });
  const next = pools.of('ann', here)!;
  assert.notEqual(next.id, pool.id);
  assert.ok(!next.key.equals(pool.key));
});
