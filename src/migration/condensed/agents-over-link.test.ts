/** The two agents with the real link between them, over a path that breaks as often as can be. */
import assert from 'node:assert/strict';
import { randomBytes, randomInt } from 'node:crypto';
import { test } from 'node:test';
import { fakeDaemons } from '../../link/fake-daemons.ts';
import { pageBytes } from '../../stream/index.ts';
import { DestinationAgent } from './destination-agent.ts';
import { SourceAgent } from './source-agent.ts';
import { allPages, FakeQemu, FakeRam, linkPair, sourceStream } from './stand-ins.ts';
import { noStatistics } from './statistics.ts';

const pages = 4000;
const cuts = 50;

for (const mode of ['precopy', 'postcopy'] as const)
  test(`a migration whose link is cut ${cuts} times loses nothing but time (${mode})`, async (context) => {
    await using daemons = await fakeDaemons();
    const ram = new FakeRam(pages);
    randomBytes(ram.bytes.length).copy(ram.bytes);
    const arrived = new FakeRam(pages);
    const { client, server } = await daemons.pair();
    // So slow that there is something under way whenever it is cut.
    client.setRateLimit(60_000_000);
    const statistics = noStatistics();
    const source = new SourceAgent({
      qemu: sourceStream(ram, { rounds: [allPages(ram)] }),
      link: client,
      memory: ram,
      mode,
      drainAtOnce: mode === 'postcopy',
      openIndex: async () => undefined,
      limitBps: () => undefined,
      statistics,
    });
    const destination = new DestinationAgent({
      qemu: new FakeQemu(arrived, [3999, 17]),
      link: server,
      memory: arrived,
      sets: [],
      openReader: async () => undefined,
    });
    let isOver = false;
    const moved = Promise.all([source.run(), destination.run()]).finally(() => {
      isOver = true;
    });
    const cutting = async () => {
      for (let made = 0; made < cuts && !isOver; made += 1) {
        const { takenCount, carriedBytes } = daemons.path;
        if (made % 2 === 0) daemons.path.cut();
        else daemons.path.cutAfter(1 + randomInt(20_000));
        await daemons.until(
          () =>
            isOver ||
            (daemons.path.takenCount > takenCount && daemons.path.carriedBytes > carriedBytes + 60_000),
          'the link is mended and carries bytes again',
        );
      }
    };
    await Promise.all([moved, cutting()]);
    context.diagnostic(
      `${client.stats.reconnects} times mended, ${client.stats.resentBytes} bytes sent again`,
    );
    assert.ok(client.stats.reconnects >= cuts, `${client.stats.reconnects} times mended`);
    assert.ok(ram.bytes.equals(arrived.bytes));
    assert.equal(statistics.repairedPages, 0);
  });

test('a byte that goes wrong in a batch between the agents never reaches QEMU', async () => {
  const ram = new FakeRam(300);
  for (let page = 0; page < 300; page += 1) ram.page(page).fill(`page ${page} `);
  for (let turn = 0; turn < 40; turn += 1) {
    const arrived = new FakeRam(300);
    const [near, far] = linkPair(undefined, { from: 1000, place: turn * 977, xor: 1 << (turn % 8) });
    const source = new SourceAgent({
      qemu: sourceStream(ram, { rounds: [allPages(ram)] }),
      link: near,
      memory: ram,
      mode: 'precopy',
      openIndex: async () => undefined,
      limitBps: () => undefined,
      compression: turn % 2 === 0 ? 'off' : 'always',
      statistics: noStatistics(),
    });
    const destination = new DestinationAgent({
      qemu: new FakeQemu(arrived),
      link: far,
      memory: arrived,
      sets: [],
      openReader: async () => undefined,
    });
    const [left, came] = await Promise.allSettled([source.run(), destination.run()]);
    assert.deepEqual([left.status, came.status], ['rejected', 'rejected']);
    for (let page = 0; page < 300; page += 1) {
      const has = arrived.page(page);
      assert.ok(
        has.equals(ram.page(page)) || has.equals(Buffer.alloc(pageBytes)),
        `page ${page} in turn ${turn}`,
      );
    }
  }
});
