/** Both agents with relays between them: real protocols, stand-ins for QEMU and for the network. */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import type { Duplex } from 'node:stream';
import { type TestContext, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { newId, type Uuid } from '../../model/ids.ts';
import { MiB } from '../../model/units.ts';
import { type BlockReader, digestBlocks, MemoryIndex } from '../../pages/index.ts';
import { pageBytes } from '../../stream/index.ts';
import { DestinationAgent } from '../condensed/destination-agent.ts';
import type { DevicePages } from '../condensed/device-pages.ts';
import { SourceAgent } from '../condensed/source-agent.ts';
import { allPages, FakeQemu, FakeRam, linkPair, sourceStream } from '../condensed/stand-ins.ts';
import { noStatistics } from '../condensed/statistics.ts';
import { Divider } from './divider.ts';
import { endsOf, type FakeRelay, fakeRelays, type RelayOptions } from './fake-relay.ts';
import { Manifest } from './manifest.ts';
import type { WholeStream } from './memory-merging.ts';
import { Pool } from './pool.ts';
import { Pools } from './pools.ts';
import { Restore } from './restore.ts';

const pages = 3000;

/** Every third page zero, the rest random, or one of so many. */
function filledRam(contents = pages): FakeRam {
  const ram = new FakeRam(pages);
  const some = Array.from({ length: contents }, () => randomBytes(pageBytes));
  for (let page = 0; page < pages; page++) if (page % 3 !== 0) some[page % contents]!.copy(ram.page(page));
  return ram;
}

interface Wanted {
  relays?: RelayOptions[];
  /** Instead: those of another move. */
  over?: FakeRelay[];
  /** With other moves. */
  pool?: Pool | undefined;
  /** The memory that moves. */
  ram?: FakeRam;
  replicas?: number;
  touches?: number[];
  /** Of the link to the destination. */
  limitBps?: number;
  /** Its guest changes these pages when relays hold some of them. */
  writes?: readonly number[];
  /** Everything goes to relays once before that. */
  dividesFirst?: boolean;
  /** What is not zero is one of so many contents. */
  contents?: number;
  /** Both ends hold every fifth page; the destination has something else there if it lies. */
  knows?: { lies: boolean };
  /** Somebody else is to be able to have all of it from relays. */
  hasCustodian?: boolean;
  /** What its QEMU reads to load the devices. */
  devicePages?: DevicePages;
  /** Which does not take what it is left with. */
  isSilent?: boolean;
  /** When the source is not needed any more: by default it is gone at once. */
  onDivided?: (parts: { relays: FakeRelay[]; sourceLink: Duplex; far: Duplex; qemu: FakeQemu }) => void;
}

async function move({
  relays: wanted = [{}, {}, {}],
  over,
  pool,
  ram: given,
  replicas = 2,
  touches = [],
  limitBps = 4_000_000,
  writes,
  dividesFirst = false,
  contents,
  knows,
  hasCustodian = false,
  isSilent = false,
  devicePages,
  onDivided,
}: Wanted = {}) {
  const relays = over ?? fakeRelays(wanted);
  const ram = given ?? filledRam(contents);
  const arrived = new FakeRam(ram.table().pages);
  const qemu = new FakeQemu(arrived, touches);
  const index = knows && new MemoryIndex({ maxEntries: pages });
  for (let page = 0; index && page < pages; page += 5) index.set(page, digestBlocks(ram.page(page)));
  const held = Buffer.from(ram.bytes);
  const reader: BlockReader = {
    blockCount: pages,
    read: async (blocks) =>
      Buffer.concat([...blocks].map((block) => held.subarray(block * pageBytes, (block + 1) * pageBytes))),
    [Symbol.asyncDispose]: () => Promise.resolve(),
  };
  if (knows?.lies) held.fill(7);
  const [near, far] = linkPair();
  const divider = new Divider({
    migrationId: newId(),
    replicas,
    relays: endsOf(relays),
    pool,
  });
  await divider.open();
  let early = 0;
  const source: SourceAgent = new SourceAgent({
    qemu: sourceStream(ram, {
      rounds: [allPages(ram), ...(writes ? [writes] : [])],
      between: async (round) => {
        source.noteRound(round + 2);
        const isEnough = () => (dividesFirst ? source.isSampled : divider.size > 8);
        await until(() => !divider.isUsable || isEnough());
        early = divider.size;
        for (const [index, page] of (writes ?? []).entries())
          if (index % 4 === 0) ram.page(page).fill(0);
          else randomBytes(pageBytes).copy(ram.page(page));
      },
    }),
    link: near,
    memory: ram,
    mode: 'postcopy',
    drainAtOnce: true,
    dividesFirst,
    dividesAll: hasCustodian,
    ...(devicePages && { devicePages: Promise.resolve(devicePages) }),
    openIndex: async () => index,
    // The destination is slow, so that relays are needed.
    limitBps: () => limitBps,
    divider,
    statistics: noStatistics(),
  });
  let kept: Buffer | undefined;
  let whole: WholeStream | undefined;
  let dividedThere = -1;
  const lost: string[] = [];
  const merging = {
    openRelay: async (id: Uuid, group: string) => relays.find((relay) => relay.id === id)!.openThere(group),
    wantsWhole: hasCustodian,
    keep: async (manifest: Manifest, left?: WholeStream) => {
      kept = manifest.toBytes();
      whole = left;
      if (isSilent) await new Promise(() => {});
    },
    onDivided: () => {
      dividedThere = qemu.lacks.size;
      if (onDivided) onDivided({ relays, sourceLink: near, far, qemu });
      else near.destroy();
    },
    onLost: (message: string) => lost.push(message),
  };
  const reading = { memory: arrived, sets: knows ? ['image:test'] : [], openReader: async () => reader };
  const destination = new DestinationAgent({ qemu, link: far, ...reading, merging });
  const [left, came] = await Promise.allSettled([source.run(), destination.run()]);
  const { statistics, sentBytes, placedBytes } = divider;
  divider.end({ drop: false });
  return {
    ram,
    arrived,
    qemu,
    relays,
    left,
    came,
    statistics,
    early,
    sentBytes,
    placedBytes,
    merged: destination.mergeStatistics,
    kept,
    whole,
    dividedThere,
    lost,
    merging,
    reading,
  };
}

type Moved = Awaited<ReturnType<typeof move>>;

function assertMoved(context: TestContext, { ram, arrived, came, qemu, statistics, merged }: Moved): void {
  context.diagnostic(JSON.stringify({ statistics, merged }));
  assert.equal(came.status, 'fulfilled', came.status === 'rejected' ? came.reason?.stack : '');
  assert.equal(qemu.lacks.size, 0);
  for (let page = 0; page < ram.table().pages; page++)
    assert.ok(ram.page(page).equals(arrived.page(page)), `page ${page}`);
}

test('the source goes when relays hold what is missing, and the destination gets all of it', async (context) => {
  const moved = await move({ touches: [1, 1000, 2999, 3, 1000] });
  assertMoved(context, moved);
  assert.ok(moved.dividedThere > pages / 2, `${moved.dividedThere} pages were missing at the exit`);
  assert.equal(moved.left.status, 'rejected', 'its link was cut');
  assert.equal(moved.statistics.zeroPages > 0, true);
  const held = moved.statistics.relays.reduce((sum, { slabs }) => sum + slabs, 0);
  assert.equal(held, 2 * moved.statistics.slabs, 'two relays hold each slab');
  assert.equal(moved.sentBytes, moved.placedBytes, 'which left the source once');
  await until(() => moved.relays.every(({ slabs }) => slabs === 0));
});

test('relays are filled while the guest runs and writes, and what it writes afterwards is taken from nowhere else', async (context) => {
  // Zeroes and others, also some that both ends hold.
  const writes = Array.from({ length: 700 }, (_, index) => index * 4);
  const touches = [0, 4, 5, 8, 400, 2000, 2001];
  for (const more of [
    {},
    { knows: { lies: false } },
    { dividesFirst: true },
    { relays: [{}, {}, { diesAfter: 6 }] },
  ]) {
    const moved = await move({ writes, touches, ...more });
    assertMoved(context, moved);
    assert.ok(moved.early > 8, `${moved.early} slabs before the switchover`);
    if (more.dividesFirst) assert.ok(moved.early > 30, 'all of them');
  }
});

test('content that is there often goes to relays once, and comes to all who have it', async (context) => {
  const writes = Array.from({ length: 300 }, (_, index) => index * 10);
  for (const more of [{}, { writes }, { relays: [{}, {}, { diesAfter: 2 }] }]) {
    const moved = await move({ contents: 400, touches: [1, 401, 2801, 5], limitBps: 2_000_000, ...more });
    assertMoved(context, moved);
    assert.ok(moved.statistics.alikePages > 500, `${moved.statistics.alikePages} pages`);
    assert.ok(moved.placedBytes < 800 * pageBytes, `${moved.placedBytes} bytes`);
  }
});

test('a relay that is lost while the source is there has what it held made good', async (context) => {
  const moved = await move({ relays: [{}, {}, { diesAfter: 4 }] });
  assertMoved(context, moved);
  assert.ok(moved.dividedThere > 0);
});

test('where relays give nothing on, or are late with it, or give on what is wrong, the source sends it again', async (context) => {
  for (const passes of ['nothing', 'late', 'noise'] as const) {
    const moved = await move({ relays: [{ passes }, { passes }], touches: [1, 2500] });
    assertMoved(context, moved);
    assert.ok(moved.dividedThere > 0);
    assert.equal(moved.sentBytes, 2 * moved.placedBytes, passes);
    assert.equal(moved.merged!.wrong, 0, 'nobody was given noise');
  }
});

test('a relay that is lost after the exit costs nothing, nor do two if there are three replicas', async (context) => {
  for (const [replicas, lost] of [
    [2, 1],
    [3, 2],
  ] as const) {
    const onDivided: Wanted['onDivided'] = ({ relays, sourceLink }) => {
      for (const relay of relays.slice(0, lost)) relay.die();
      sourceLink.destroy();
    };
    assertMoved(context, await move({ replicas, onDivided }));
  }
});

test('what a relay changes is noticed, and fetched from another', async (context) => {
  const moved = await move({ relays: [{ lies: true }, {}], touches: [1, 2500] });
  assertMoved(context, moved);
  assert.ok(moved.merged!.wrong > 0);
});

test('a relay that says nothing is not waited for', async (context) => {
  const moved = await move({ relays: [{ isSilent: true }, {}] });
  assertMoved(context, moved);
  assert.ok(moved.merged!.refetched > 0);
});

test('relays that are full are passed by; if too few are left, the source waits for the destination', async (context) => {
  const one = await move({ relays: [{ quotaBytes: 200_000 }, {}, {}] });
  assertMoved(context, one);
  assert.ok(one.dividedThere > 0);
  const none = await move({ relays: [{ quotaBytes: 2 * MiB }, {}], limitBps: 1e8 });
  assertMoved(context, none);
  assert.ok(none.dividedThere < one.dividedThere);
});

test('what both ends hold goes to no relay; where the destination is wrong about it, the source mends it', async (context) => {
  for (const lies of [false, true]) {
    const moved = await move({ knows: { lies }, limitBps: lies ? 20_000_000 : 4_000_000 });
    assertMoved(context, moved);
    assert.ok(moved.dividedThere > 0);
    // A third is zero, and of the rest every fifth is known.
    const { bytes } = moved.merged!;
    assert.ok(bytes < (2 / 3) * (4 / 5) * 1.05 * pages * pageBytes, `${bytes} bytes`);
  }
});

test('without relays it is a post-copy', async (context) => {
  const moved = await move({ relays: [], limitBps: 1e9 });
  assertMoved(context, moved);
  assert.equal(moved.left.status, 'fulfilled');
  assert.equal(moved.dividedThere, -1);
});

test('an agent that knows nothing but the manifest goes on where the one before was lost', async (context) => {
  const moved = await move({
    onDivided: daemonDies,
  });
  assert.ok(moved.qemu.lacks.size > pages / 2);
  await goOn(context, moved);
});

const daemonDies: Wanted['onDivided'] = ({ qemu, sourceLink }) => {
  sourceLink.destroy();
  qemu.destroy(new Error('the daemon died'));
};

/** By another agent, which knows the manifest alone. */
async function goOn(context: TestContext, moved: Moved): Promise<void> {
  assert.equal(moved.came.status, 'rejected');
  const again = new FakeQemu(moved.arrived, [1, 2, 700], moved.qemu);
  const agent = new DestinationAgent({
    qemu: again,
    link: undefined,
    ...moved.reading,
    merging: { ...moved.merging, manifest: Manifest.fromBytes(moved.kept!) },
  });
  const [came] = await Promise.allSettled([agent.run()]);
  assertMoved(context, { ...moved, qemu: again, came, merged: agent.mergeStatistics });
}

/** Has less memory than the other one, most of it the same at other places, and of so many pages a tenth of its own. */
function kinOf(ram: FakeRam): FakeRam {
  const kin = new FakeRam(pages - 500);
  for (let page = 0; page < pages - 500; page++)
    if (page % 10 === 0) randomBytes(pageBytes).copy(kin.page(page));
    else ram.page(pages - 5 - page).copy(kin.page(page));
  return kin;
}

test('what VMs of one tenant have in common goes to relays once, and comes to both; those of others share nothing', async (context) => {
  const sent: number[] = [];
  for (const tenants of [
    ['ann', 'ann'],
    ['ann', 'bob'],
  ] as const) {
    const [over, pools, ram, to] = [fakeRelays([{}, {}, {}]), new Pools(), filledRam(), newId()];
    const touches = [1, 1000, 2400, 3];
    const begun = [ram, kinOf(ram)].map((each, index) =>
      move({ over, pool: pools.of(tenants[index], to), ram: each, touches }),
    );
    const both = await Promise.all(begun);
    for (const moved of both) {
      assertMoved(context, moved);
      assert.ok(moved.dividedThere > pages / 2);
    }
    sent.push(both.reduce((sum, { sentBytes }) => sum + sentBytes, 0));
    const borrowed = both.map(({ statistics }) => statistics.borrowedPages ?? 0);
    assert.equal(Math.max(...borrowed) > 0, tenants[1] === 'ann', `${borrowed} pages`);
    await until(() => over.every(({ slabs }) => slabs === 0));
  }
  const [together, apart] = sent as [number, number];
  // Two thirds of each are not zero; a tenth of the second is its own.
  const once = ((pages * 2) / 3 + (pages - 500) / 10) * pageBytes;
  assert.ok(together < once * 1.05, `${together} bytes of ${once}`);
  assert.ok(apart > once * 1.4, `${apart} bytes of ${once}`);
});

test('VMs that share keep what they share, whichever is whole first, each from its manifest alone', async (context) => {
  for (const order of [
    [0, 1],
    [1, 0],
  ] as const) {
    const [over, pool, ram] = [fakeRelays([{}, {}, {}]), new Pool(newId()), filledRam()];
    const first = await move({ over, pool, ram, onDivided: daemonDies });
    const second = await move({ over, pool, ram: kinOf(ram), onDivided: daemonDies });
    const { borrowedPages = 0 } = second.statistics;
    assert.ok(borrowedPages > pages / 3, `${borrowedPages} pages are those of one that has left`);
    const [sooner, later] = order.map((each) => [first, second][each]!) as [Moved, Moved];
    await goOn(context, sooner);
    const { group } = Manifest.fromBytes(sooner.kept!).division;
    await until(() => over.every(({ store }) => store.groups().get(group)?.slabs === 0));
    await goOn(context, later);
    await until(() => over.every(({ slabs }) => slabs === 0));
  }
});

test('VMs that share and write, and lose a relay before they leave, are whole', async (context) => {
  const over = fakeRelays([{}, {}, { diesAfter: 12 }]);
  const [pool, ram] = [new Pool(newId()), filledRam(800)];
  const writes = Array.from({ length: 500 }, (_, index) => index * 4);
  const more = { over, pool, writes, touches: [0, 4, 400, 2001], contents: 800 };
  for (const moved of await Promise.all([move({ ...more, ram }), move({ ...more, ram: kinOf(ram) })]))
    assertMoved(context, moved);
});

test('with a custodian all pages are with relays, and whoever has manifest and devices has the VM as it left', async (context) => {
  const writes = Array.from({ length: 700 }, (_, index) => index * 4);
  const devicePages = {
    areas: [4, 1000].map((page) => ({ address: page * pageBytes, bytes: 1 })),
    anchors: [{ address: 0, block: 'pc.ram', byte: 0 }],
  };
  const lostHere: Wanted['onDivided'] = ({ qemu, sourceLink }) => {
    sourceLink.destroy();
    qemu.destroy(new Error('the destination is lost'));
  };
  for (const more of [
    {},
    { dividesFirst: true, contents: 400 },
    { knows: { lies: true } },
    { relays: [{}, {}, { diesAfter: 6 }] },
    { relays: [{ lies: true }, {}] },
    { devicePages },
  ]) {
    const moved = await move({
      hasCustodian: true,
      writes,
      touches: [0, 4, 1000],
      onDivided: lostHere,
      ...more,
    });
    assert.ok(moved.dividedThere > 0, 'the destination had not all of it');
    const restored = new FakeRam(pages);
    // What is there before the pages come must not show through where they are zero.
    restored.bytes.fill(0xee);
    const qemu = new FakeQemu(restored);
    const manifest = Manifest.fromBytes(moved.kept!);
    const { relays } = manifest.division;
    const open = (relay: number) => moved.merging.openRelay(relays[relay]!, manifest.division.group);
    const { signal } = new AbortController();
    const restore = new Restore({ qemu, manifest, whole: moved.whole!, open, signal });
    await restore.run();
    assert.equal(qemu.isPostcopy, false);
    assert.ok(qemu.tail.length > 0);
    for (let page = 0; page < pages; page++)
      assert.ok(moved.ram.page(page).equals(restored.page(page)), `page ${page}`);
    await restore.end({ drop: true });
    const alive = moved.relays.filter(({ isDead }) => !isDead);
    await until(() => alive.every(({ slabs }) => slabs === 0));
    // A second one comes too late, and says so instead of giving a QEMU half of a VM.
    const late = new Restore({
      qemu: new FakeQemu(new FakeRam(pages)),
      manifest,
      whole: moved.whole!,
      open,
      signal,
    });
    await assert.rejects(late.run(), /The memory is not whole any more: Slab \d+ is not at relay/);
    await late.end({ drop: false });
    context.diagnostic(JSON.stringify(moved.statistics));
  }
});

test('the destination becomes whole, and the source may go, though the custodian never answers', async (context) => {
  const moved = await move({ hasCustodian: true, limitBps: 1e9, isSilent: true });
  assertMoved(context, moved);
  assert.equal(moved.left.status, 'fulfilled', 'it stayed until nothing was missing');
  assert.equal(moved.dividedThere, -1);
});

test('a slab that nobody gives is told of, and the rest comes', async () => {
  const relays: FakeRelay[] = [];
  let qemu: FakeQemu | undefined;
  const moving = move({
    onDivided: (parts) => {
      relays.push(...parts.relays);
      qemu = parts.qemu;
      for (const relay of parts.relays) {
        const { get } = relay.store;
        relay.store.get = (group, slab) => (slab === 2 ? undefined : get(group, slab));
      }
      parts.sourceLink.destroy();
    },
  });
  await until(() => (qemu?.lacks.size ?? pages) <= 64);
  assert.ok(qemu!.lacks.size > 0);
  qemu!.destroy();
  const { came, lost } = await moving;
  assert.equal(came.status, 'rejected');
  assert.match(lost.join(), /Slab 2 is not at relay/);
});

async function until(condition: () => boolean): Promise<void> {
  for (const deadline = Date.now() + 20_000; !condition(); await sleep(5))
    assert.ok(Date.now() < deadline, 'waited in vain');
}

/** Its guest touches a page that has come, when QEMU has everything and has not read its last bytes yet. */
class LateQemu extends FakeQemu {
  hasAsked = false;

  override _write(bytes: Buffer, encoding: BufferEncoding, done: (error?: Error) => void): void {
    super._write(bytes, encoding, (error) => {
      done(error);
      if (!this.isPostcopy || this.tail.length === 0 || this.hasAsked) return;
      this.hasAsked = true;
      const { name: blockName } = this.ram.table().blocks[0]!;
      const startByte = 3 * pageBytes;
      setImmediate(() => this.answer({ name: 'request-pages', startByte, bytes: pageBytes, blockName }));
    });
  }
}

test('a QEMU that asks when everything has come without relays is no reason to ask the source', async () => {
  const [ram, arrived] = [filledRam(), new FakeRam(pages)];
  const qemu = new LateQemu(arrived);
  const [near, far] = linkPair();
  const divider = new Divider({ migrationId: newId(), replicas: 2, relays: [] });
  await divider.open();
  const source = new SourceAgent({
    qemu: sourceStream(ram, { rounds: [allPages(ram)] }),
    link: near,
    memory: ram,
    mode: 'postcopy',
    drainAtOnce: true,
    openIndex: async () => undefined,
    limitBps: () => undefined,
    statistics: noStatistics(),
    divider,
  });
  const destination = new DestinationAgent({
    qemu,
    link: far,
    memory: arrived,
    sets: [],
    openReader: async () => undefined,
    merging: {
      openRelay: () => Promise.reject(new Error('there is no relay')),
      keep: async () => {},
      onDivided: () => {},
      onLost: () => {},
    },
  });
  await Promise.all([source.run(), destination.run()]);
  divider.end({ drop: false });
  assert.ok(qemu.hasAsked);
  for (let page = 0; page < pages; page++)
    assert.ok(ram.page(page).equals(arrived.page(page)), `page ${page}`);
});
