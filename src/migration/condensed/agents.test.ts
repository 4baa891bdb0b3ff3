import assert from 'node:assert/strict';
import { randomBytes, randomInt } from 'node:crypto';
import { type TestContext, test } from 'node:test';
import {
  type BlockReader,
  digestBlocks,
  digestOf,
  MemoryIndex,
  type SetIndex,
  type SetName,
} from '../../pages/index.ts';
import { pageBytes } from '../../stream/index.ts';
import { DestinationAgent } from './destination-agent.ts';
import type { DevicePages } from './device-pages.ts';
import { encodeFrame, encodeJson, frame, protocolVersion } from './frames.ts';
import type { AgentMode } from './handshake.ts';
import { PageSet } from './page-set.ts';
import { SourceAgent } from './source-agent.ts';
import { allPages, FakeQemu, FakeRam, linkPair, sourceStream } from './stand-ins.ts';
import { noStatistics } from './statistics.ts';

const pages = 700;

/** Every third page zero, every fifth like another, the rest random. */
function filledRam(): FakeRam {
  const ram = new FakeRam(pages);
  for (let page = 0; page < pages; page++) {
    if (page % 3 === 0) continue;
    if (page % 5 === 0) ram.page(page).fill(page % 7);
    else randomBytes(pageBytes).copy(ram.page(page));
  }
  return ram;
}

interface Wanted {
  mode?: AgentMode;
  ram?: FakeRam;
  rounds?: number[][];
  between?: (round: number, agent: SourceAgent) => void | Promise<void>;
  touches?: number[];
  drainAtOnce?: boolean;
  devicePages?: DevicePages;
  index?: SetIndex;
  reader?: BlockReader;
  cutAfterBytes?: number;
  reads?: boolean;
  strange?: Buffer;
  limitBps?: number;
  setTimeoutMs?: number;
  claims?: boolean;
  /** Whether pages may come past the stream. */
  places?: boolean;
}

const setName: SetName = 'image:test';

async function move(wanted: Wanted = {}) {
  const { ram = filledRam(), mode = 'precopy', index, reader } = wanted;
  const { cutAfterBytes, touches = [], strange, limitBps, reads = true, drainAtOnce = false } = wanted;
  const { places = true, devicePages } = wanted;
  const [near, far] = linkPair(cutAfterBytes);
  const arrived = new FakeRam(pages);
  const qemu = new FakeQemu(arrived, touches);
  const rounds = wanted.rounds ?? [allPages(ram)];
  const source = new SourceAgent({
    qemu: sourceStream(ram, {
      rounds,
      between: (round) => wanted.between?.(round, source),
      ...(strange && { strange }),
    }),
    link: near,
    memory: ram,
    mode,
    drainAtOnce,
    ...(devicePages && { devicePages: Promise.resolve(devicePages) }),
    openIndex: async (name) => (name === setName ? index : undefined),
    limitBps: () => limitBps,
    statistics: noStatistics(),
  });
  const destination = new DestinationAgent({
    qemu,
    link: far,
    memory: reads ? arrived : undefined,
    placing: places ? { memory: arrived, keep: () => Promise.resolve() } : undefined,
    sets: reader || wanted.claims ? [setName] : [],
    openReader: async () => reader,
    ...(wanted.setTimeoutMs === undefined ? {} : { setTimeoutMs: wanted.setTimeoutMs }),
  });
  const [left, came] = await Promise.allSettled([source.run(), destination.run()]);
  const { statistics } = source;
  return { ram, arrived, qemu, left, came, statistics, places, wasCut: near.errored !== null };
}

type Moved = Awaited<ReturnType<typeof move>>;

function assertMoved(context: TestContext, moved: Moved): void {
  const { ram, arrived, left, came, qemu, statistics, places } = moved;
  context.diagnostic(JSON.stringify(statistics));
  assert.deepEqual(
    [left.status, came.status],
    ['fulfilled', 'fulfilled'],
    String([left, came].map(reasonOf)),
  );
  assert.deepEqual(qemu.unanswered, []);
  // Nobody has to say that pages are zero that never were anything else.
  if (!places) assert.equal(qemu.lacks.size, 0);
  for (let page = 0; page < pages; page++)
    assert.ok(ram.page(page).equals(arrived.page(page)), `page ${page}`);
}

const reasonOf = (settled: PromiseSettledResult<void>): string =>
  settled.status === 'rejected' ? String(settled.reason?.stack) : 'fulfilled';

test('a pre-copy arrives, with zero pages and equal pages told in a few bytes', async (context) => {
  const moved = await move();
  assertMoved(context, moved);
  const { statistics, qemu } = moved;
  assert.equal(qemu.isPostcopy, false);
  assert.ok(qemu.tail.length > 0);
  assert.ok(statistics.pages.zero > pages / 3);
  assert.ok(statistics.pages.copy > 40);
  assert.equal(statistics.repairedPages, 0);
});

test('pages that the guest writes go again, as what changed in them', async (context) => {
  const ram = filledRam();
  const hot = [1, 2, 4, 7, 601];
  const moved = await move({
    ram,
    rounds: [allPages(ram), hot, [...hot, 8], hot, [8, 3]],
    between: (round) => {
      if (round < 3) for (const page of hot) ram.page(page).writeUInt32LE(round + 1, 8 * round);
      // From something to nothing, and from nothing to something.
      if (round === 1) ram.page(8).fill(0);
      if (round === 3) ram.page(3).fill(9);
    },
  });
  assertMoved(context, moved);
  assert.ok(moved.statistics.pages.delta >= 2 * hot.length);
});

test('a page that was written but not changed costs nothing', async (context) => {
  const ram = filledRam();
  const moved = await move({ ram, rounds: [allPages(ram), [1, 2, 4]] });
  assertMoved(context, moved);
  assert.equal(moved.statistics.pages.unchanged, 3);
});

test('a destination that cannot read its QEMU gets pages that refer to no others', async (context) => {
  const moved = await move({ reads: false });
  assertMoved(context, moved);
  assert.equal(moved.statistics.pages.copy, 0);
});

test('in hybrid, what is written after the first pass comes after the guest, each page once', async (context) => {
  const ram = filledRam();
  // More than a link of this rate takes in a moment; what is hottest goes before the guest runs there.
  const limitBps = 40_000_000;
  const written = allPages(ram).slice(0, 300);
  const moved = await move({
    ram,
    mode: 'postcopy',
    rounds: [allPages(ram), written, [1, 2]],
    between: (round, agent) => {
      if (round === 0) agent.drain();
      for (const page of written) randomBytes(pageBytes).copy(ram.page(page));
    },
    // The last one has never been anything but zero.
    touches: [299, 2, 2, 305, 303],
    limitBps,
  });
  assertMoved(context, moved);
  const { postcopyPages, requestedPages } = moved.statistics;
  assert.equal(moved.qemu.isPostcopy, true);
  assert.ok(postcopyPages > 0 && postcopyPages < written.length, `${postcopyPages} pages`);
  assert.equal(requestedPages, 1, 'neither what had come nor what is hot');
});

test('in post-copy everything comes after the guest', async (context) => {
  const moved = await move({ mode: 'postcopy', drainAtOnce: true, touches: [13, 699, 400, 0] });
  assertMoved(context, moved);
  assert.equal(moved.statistics.postcopyPages, pages);
});

test('what QEMU reads to load the devices goes before it does', async (context) => {
  const read = [5, 210, 400, 401];
  const areas = read.map((page) => ({ address: page * pageBytes, bytes: 100 }));
  const anchors = [{ address: 0, block: 'pc.ram', byte: 0 }];
  const wanted = { mode: 'postcopy', drainAtOnce: true, touches: read } as const;
  const unknown = await move({ ...wanted, touches: [...read] });
  assert.equal(unknown.statistics.requestedPages, read.length);
  const moved = await move({ ...wanted, touches: [...read], devicePages: { areas, anchors } });
  assertMoved(context, moved);
  assert.equal(moved.statistics.requestedPages, 0);
});

test('a hybrid in which nothing is left to send ends as pre-copy', async (context) => {
  const empty = new FakeRam(pages);
  const moved = await move({
    ram: empty,
    mode: 'postcopy',
    rounds: [allPages(empty), []],
    between: (_, agent) => agent.drain(),
  });
  assertMoved(context, moved);
  assert.equal(moved.qemu.isPostcopy, false);
});

/** A set of all pages with content of the RAM. */
async function setOf(ram: FakeRam): Promise<{ index: SetIndex; reader: BlockReader }> {
  const index = new MemoryIndex({ maxEntries: pages });
  for (let page = 0; page < pages; page++) index.set(page, digestBlocks(ram.page(page)));
  const copy = Buffer.from(ram.bytes);
  const reader: BlockReader = {
    blockCount: pages,
    read: async (blocks) =>
      Buffer.concat([...blocks].map((block) => copy.subarray(block * pageBytes, (block + 1) * pageBytes))),
    [Symbol.asyncDispose]: () => Promise.resolve(),
  };
  return { index, reader };
}

test('what a reference set has does not travel', async (context) => {
  const ram = filledRam();
  const moved = await move({ ram, ...(await setOf(ram)) });
  assertMoved(context, moved);
  assert.equal(moved.statistics.pages.literal, 0);
  assert.ok(moved.statistics.wireBytes < 16_384, `${moved.statistics.wireBytes} bytes`);
});

for (const mode of ['precopy', 'postcopy'] as const)
  test(`a reference set that lies costs bytes and no more (${mode})`, async (context) => {
    const ram = filledRam();
    const { index, reader } = await setOf(ram);
    const lying: BlockReader = {
      ...reader,
      async read(blocks) {
        const bytes = await reader.read(blocks);
        bytes[0]! ^= 1;
        return bytes;
      },
    };
    const drainAtOnce = mode === 'postcopy';
    const moved = await move({ ram, mode, drainAtOnce, index, reader: lying, touches: [2, 100] });
    assertMoved(context, moved);
    // In post-copy batches are small: after a few of them the source knows.
    assert.ok(moved.statistics.repairedPages > (mode === 'precopy' ? 400 : 40));
  });

test('a reference set that cannot be read is done without', async (context) => {
  const ram = filledRam();
  const { index } = await setOf(ram);
  const { AppError } = await import('../../model/errors.ts');
  const reader: BlockReader = {
    blockCount: pages,
    read: () => Promise.reject(new AppError('image_corrupt', 'The storage is gone')),
    [Symbol.asyncDispose]: () => Promise.resolve(),
  };
  assertMoved(context, await move({ ram, index, reader }));
});

test('a reference set whose storage does not answer is given up, and costs its wait once', async (context) => {
  const ram = filledRam();
  const { index } = await setOf(ram);
  let reads = 0;
  const reader: BlockReader = {
    blockCount: pages,
    read: () => {
      reads += 1;
      return new Promise(() => {});
    },
    [Symbol.asyncDispose]: () => new Promise(() => {}),
  };
  const moved = await move({
    ram,
    index,
    reader,
    setTimeoutMs: 20,
    rounds: [allPages(ram), [1, 2], allPages(ram)],
  });
  assertMoved(context, moved);
  assert.equal(reads, 1);
  assert.ok(moved.statistics.repairedPages > 0);
});

test('a set that turns out wrong again and again is referred to no more', async (context) => {
  const ram = filledRam();
  const { index, reader } = await setOf(ram);
  const lying: BlockReader = {
    ...reader,
    read: async (blocks) => Buffer.alloc(blocks.length * pageBytes, 1),
  };
  const hot = Array.from({ length: 100 }, (_, page) => page + 1);
  const moved = await move({
    ram,
    index,
    reader: lying,
    // In small batches, each answered before the next.
    rounds: Array.from({ length: 16 }, () => hot),
    between: () => new Promise((resolve) => setTimeout(resolve, 20)),
  });
  assert.deepEqual([moved.left.status, moved.came.status], ['fulfilled', 'fulfilled']);
  for (const page of hot) assert.ok(ram.page(page).equals(moved.arrived.page(page)), `page ${page}`);
  const wrong = moved.statistics.repairedPages / hot.filter((page) => page % 3 !== 0).length;
  context.diagnostic(`wrong ${wrong} times`);
  assert.ok(wrong >= 1 && wrong < 12, `wrong ${wrong} times`);
});

test('a destination that claims a set which it does not have gets its pages all the same', async (context) => {
  const ram = filledRam();
  const { index } = await setOf(ram);
  const moved = await move({ ram, index, claims: true });
  assertMoved(context, moved);
  assert.ok(moved.statistics.repairedPages > 0);
});

test('a stream with sections that nobody here knows goes over as it is', async () => {
  const strange = Buffer.from('0100000003056f746865720000000000000001deadbeef', 'hex');
  const { statistics, came } = await move({ strange });
  assert.match(statistics.fallback ?? '', /iterable section/);
  // The stand-in for QEMU knows it as little, but it got it.
  assert.match(reasonOf(came), /iterable section/);
});

test('a post-copy goes on with what was missing before and has not come, whatever QEMU asks for meanwhile', async () => {
  const ram = filledRam();
  const arrived = new FakeRam(pages);
  // Up to 400 pages had come past the stream, the rest was missing, and some of that has come by the stream.
  const came = allPages(ram).filter((page) => page < 400 || (page >= 500 && page < 520));
  const wasThere = new Set(came.filter((page) => page >= 400 || page % 3 !== 0));
  for (const page of came) ram.page(page).copy(arrived.page(page));
  const paused = {
    lacks: new Set(allPages(ram).filter((page) => !wasThere.has(page))),
    received: new Set(came.filter((page) => page >= 400)),
  };
  const missingBefore = new PageSet(pages);
  missingBefore.addRange(400, pages - 400);
  // Of zeroes that nobody misses, and with content.
  const qemu = new FakeQemu(arrived, [3, 6, 401, 697, 698], paused);
  const [near, far] = linkPair();
  const source = new SourceAgent({
    qemu: undefined,
    link: near,
    memory: ram,
    mode: 'resume',
    openIndex: async () => undefined,
    limitBps: () => undefined,
    statistics: noStatistics(),
  });
  const destination = new DestinationAgent({
    qemu,
    link: far,
    memory: arrived,
    missingBefore: missingBefore.toBytes(),
    sets: [],
    openReader: async () => undefined,
  });
  await Promise.all([source.run(), destination.run()]);
  assert.deepEqual(qemu.unanswered, []);
  for (const page of allPages(ram)) assert.ok(ram.page(page).equals(arrived.page(page)), `page ${page}`);
});

test('a link that is cut anywhere ends both sides, and neither takes the VM for moved', async () => {
  const ram = filledRam();
  const totals: number[] = [];
  let cuts = 0;
  for (let turn = 0; turn < 50; turn++) {
    const wanted = { ram, mode: 'postcopy', drainAtOnce: turn % 2 === 0 } as const;
    const whole = turn < 2 ? (await move(wanted)).statistics.wireBytes : totals[turn % 2]!;
    totals[turn % 2] = whole;
    const cutAfterBytes = randomInt(whole - 10);
    const { left, came, wasCut } = await move({ ...wanted, cutAfterBytes });
    // What a move takes varies a little with when its batches were closed: one may be done before the cut.
    const outcome = wasCut ? 'rejected' : 'fulfilled';
    assert.deepEqual([left.status, came.status], [outcome, outcome], `cut after ${cutAfterBytes} bytes`);
    if (wasCut) cuts += 1;
  }
  assert.ok(cuts > 25, `${cuts} of 50 were cut`);
});

test('a destination takes nothing from a source that breaks the rules', async () => {
  const hello = encodeJson(frame.hello, { version: protocolVersion, mode: 'precopy', sets: [] });
  const blocks = encodeJson(frame.blocks, { sectionId: 2, blocks: [{ name: 'pc.ram', sizeBytes: 8192 }] });
  const opened = [hello, encodeFrame(frame.opening, Buffer.from('5145564d00000003', 'hex')), blocks];
  const batch = (bytes: number, body: Buffer, packed = 0): Buffer => {
    const head = Buffer.of(packed, 0, 0, 0, 0);
    head.writeUInt32BE(bytes, 1);
    return encodeFrame(frame.batch, head, digestOf(Buffer.alloc(0)), body);
  };
  const bomb = (await import('node:zlib')).zstdCompressSync(Buffer.alloc(64 * 1024 * 1024));
  const attempts: Record<string, Buffer[]> = {
    'a batch before its hello': [batch(4, Buffer.alloc(4))],
    'another version': [encodeJson(frame.hello, { version: 99, mode: 'precopy', sets: [] })],
    'a set that was not offered': [
      encodeJson(frame.hello, { version: protocolVersion, mode: 'precopy', sets: ['image:other'] }),
    ],
    'a frame of a GiB': [Buffer.of(4, 0x40, 0, 0, 0)],
    'an unknown frame': [Buffer.of(99, 0, 0, 0, 0)],
    'a block that is too large': [
      hello,
      encodeJson(frame.blocks, { sectionId: 2, blocks: [{ name: 'pc.ram', sizeBytes: 2 ** 50 }] }),
    ],
    'two tables': [...opened, blocks],
    'a page out of range': [...opened, batch(8, Buffer.of(0, 0, 0, 3, 0, 200, 1, 1))],
    'a zip bomb': [...opened, batch(1000, bomb, 1)],
    'a claim of 4 GiB': [...opened, batch(0xffff_ffff, bomb, 1)],
    'an end in the middle': opened,
  };
  for (const [what, frames] of Object.entries(attempts)) {
    const [near, far] = linkPair();
    const agent = new DestinationAgent({
      qemu: new FakeQemu(new FakeRam(8)),
      link: far,
      memory: new FakeRam(8),
      sets: [],
      openReader: async () => undefined,
    });
    near.resume();
    for (const bytes of frames) near.write(bytes);
    near.end();
    await assert.rejects(agent.run(), /The agent at the other end/, what);
  }
});
