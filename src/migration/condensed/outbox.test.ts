import assert from 'node:assert/strict';
import { Writable } from 'node:stream';
import { test } from 'node:test';
import { setImmediate } from 'node:timers/promises';
import { Outbox, type OutboxOptions } from './outbox.ts';

/** A link that takes what is written only when it is told to, and says of itself what it is told to say. */
class SlowLink extends Writable {
  readonly stats = {
    sentBytes: 0,
    unacknowledgedBytes: 0,
    unsentBytes: 0,
    deliveryRateBps: 0,
    leastRttMs: 20,
  };
  readonly taken: number[] = [];
  #done: (() => void) | undefined;

  override _write(bytes: Buffer, _encoding: BufferEncoding, done: () => void): void {
    this.taken.push(bytes.length);
    this.#done = done;
  }

  async take(): Promise<void> {
    this.#done?.();
    this.#done = undefined;
    for (let turn = 0; turn < 5; turn += 1) await setImmediate();
  }
}

async function opened(more: Partial<OutboxOptions> = {}) {
  const abort = new AbortController();
  const link = new SlowLink();
  const outbox = new Outbox({ link, signal: abort.signal, limitBps: () => undefined, ...more });
  return { link, outbox, [Symbol.dispose]: () => abort.abort() };
}

const frames = async (outbox: Outbox, count: number, bytes: number): Promise<void> => {
  for (let each = 0; each < count; each += 1) outbox.send(Promise.resolve([Buffer.alloc(bytes)]));
  for (let turn = 0; turn < 5; turn += 1) await setImmediate();
};

test('few frames wait for a slow link, and more only as far as there is a reserve for what is made', async () => {
  using without = await opened();
  await frames(without.outbox, 4, 1000);
  assert.equal(without.outbox.hasRoom, false);
  let reserve = 10_000;
  using reserved = await opened({ reserveBytes: () => reserve });
  await frames(reserved.outbox, 4, 1000);
  assert.equal(reserved.outbox.hasRoom, true);
  await frames(reserved.outbox, 7, 1000);
  // The first one is with the link.
  assert.equal(reserved.outbox.hasRoom, false);
  await reserved.link.take();
  assert.equal(reserved.outbox.hasRoom, true);
  reserve = 0;
  assert.equal(reserved.outbox.hasRoom, false);
});

test('frames that are still being made take room, whatever the reserve', async () => {
  using world = await opened({ reserveBytes: () => 1e9 });
  for (let each = 0; each < 4; each += 1) world.outbox.send(new Promise(() => {}));
  assert.equal(world.outbox.hasRoom, false);
});

test('what is urgent is written only when little is under way before it', async () => {
  using world = await opened({ isUrgent: () => true });
  world.link.stats.unsentBytes = 1_000_000;
  await frames(world.outbox, 1, 1000);
  assert.deepEqual(world.link.taken, []);
  world.link.stats.unsentBytes = 1000;
  while (world.link.taken.length === 0) await setImmediate();
  assert.deepEqual(world.link.taken, [1000]);
});

test('a link that has little to carry is as fast as it was when it was busy, or of unknown speed', async () => {
  using world = await opened();
  const { stats } = world.link;
  stats.deliveryRateBps = 800_000;
  assert.equal(world.outbox.speed, undefined);
  // It has just begun.
  stats.sentBytes = stats.unacknowledgedBytes = 1_000_000;
  assert.equal(world.outbox.speed, undefined);
  stats.sentBytes += 2_000_000;
  stats.deliveryRateBps = 80_000_000;
  assert.equal(world.outbox.speed, 10_000_000);
  stats.unacknowledgedBytes = 1000;
  stats.deliveryRateBps = 800_000;
  assert.equal(world.outbox.speed, 10_000_000);
});

test('a link that a limit holds back is as fast as the limit', async () => {
  let limitBps: number | undefined = 80_000_000;
  using world = await opened({ limitBps: () => limitBps });
  await frames(world.outbox, 1, 40_000);
  await world.link.take();
  await world.outbox.room(0);
  assert.equal(world.outbox.speed, 10_000_000);
  limitBps = undefined;
  assert.equal(world.outbox.speed, undefined);
});
