/** What decides how much is sent and granted: meters, window, limiters, and the memory of a receiver. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { AppError } from '../model/errors.ts';
import { KiB, MiB } from '../model/units.ts';
import { fuzz } from './fuzz.ts';
import { defaultLimits, resolveLimits } from './limits.ts';
import { DeliveryMeter, RoundTripMeter } from './meters.ts';
import { RateLimiter } from './rate-limiter.ts';
import { Receiver } from './receiver.ts';
import { WindowTuner } from './window.ts';

test('the window grows to twice the bandwidth-delay product while the reader keeps up, and up to its bound', () => {
  const tuner = new WindowTuner(256 * KiB, 16 * MiB);
  const rttMs = 100;
  // 40 Mbit/s: half a megabyte in a round trip.
  for (let nowMs = 0; nowMs < 5000; nowMs += 10) tuner.consumed(50_000, nowMs, rttMs);
  assert.ok(tuner.windowBytes > 900_000 && tuner.windowBytes < 1_200_000, String(tuner.windowBytes));
  for (let nowMs = 5000; nowMs < 10_000; nowMs += 10) tuner.consumed(5_000_000, nowMs, rttMs);
  assert.equal(tuner.windowBytes, 16 * MiB);
});

test('the window shrinks, but only slowly and not below where it began', () => {
  const tuner = new WindowTuner(256 * KiB, 16 * MiB);
  for (let nowMs = 0; nowMs < 5000; nowMs += 10) tuner.consumed(5_000_000, nowMs, 100);
  tuner.consumed(1000, 5200, 100);
  assert.equal(tuner.windowBytes, 16 * MiB);
  for (let nowMs = 5300; nowMs < 60_000; nowMs += 100) tuner.consumed(1000, nowMs, 100);
  assert.equal(tuner.windowBytes, 256 * KiB);
});

test('without a measured round trip the window stays', () => {
  const tuner = new WindowTuner(256 * KiB, 16 * MiB);
  for (let nowMs = 0; nowMs < 5000; nowMs += 10) tuner.consumed(5_000_000, nowMs, undefined);
  assert.equal(tuner.windowBytes, 256 * KiB);
});

test('the round trip of the path is the shortest of the last few, whatever waits behind our own bytes', () => {
  const meter = new RoundTripMeter();
  assert.equal(meter.leastRttMs, undefined);
  for (const rttMs of [80, 20, 300, 90, 120]) meter.sample(rttMs);
  assert.equal(meter.leastRttMs, 20);
  // The path has changed.
  for (let count = 0; count < 30; count += 1) meter.sample(150);
  assert.equal(meter.leastRttMs, 150);
  meter.reset();
  assert.equal(meter.leastRttMs, undefined);
});

test('the delivery rate is that of the busy times', () => {
  const meter = new DeliveryMeter();
  for (let nowMs = 0; nowMs <= 1000; nowMs += 10) meter.delivered(10_000, nowMs);
  assert.equal(meter.rateBps, 8_000_000);
  meter.pause(1000);
  // A long rest, then the same again.
  for (let nowMs = 60_000; nowMs <= 61_000; nowMs += 10) meter.delivered(10_000, nowMs);
  assert.equal(meter.rateBps, 8_000_000);
});

test('sessions that share a limiter get equal shares, and together no more than the rate', (t) => {
  t.mock.timers.enable({ apis: ['setTimeout'] });
  let nowMs = 0;
  const limiter = new RateLimiter(8_000_000, { nowMs: () => nowMs });
  const sent = [0, 0, 0];
  const ask = (index: number): void => {
    const bytes = limiter.quantumBytes;
    limiter.request(bytes, () => {
      sent[index]! += bytes;
      ask(index);
    });
  };
  for (const index of sent.keys()) ask(index);
  for (; nowMs < 3000; nowMs += 1) t.mock.timers.tick(1);
  const total = sent.reduce((sum, each) => sum + each);
  assert.ok(Math.abs(total - 3_000_000) < 100_000, `${total} bytes in 3 s at 1 MB/s`);
  for (const each of sent) assert.ok(Math.abs(each - total / 3) <= limiter.quantumBytes, String(sent));
});

test('a party of many sessions gets no more than one of a single session', (t) => {
  t.mock.timers.enable({ apis: ['setTimeout'] });
  let nowMs = 0;
  const limiter = new RateLimiter(8_000_000, { nowMs: () => nowMs });
  const [many, single] = [{ sent: 0 }, { sent: 0 }];
  const ask = (party: { sent: number }): void => {
    const bytes = limiter.quantumBytes;
    const onGrant = () => {
      party.sent += bytes;
      ask(party);
    };
    limiter.request(bytes, onGrant, party);
  };
  for (const party of [many, many, single, many, many]) ask(party);
  for (; nowMs < 3000; nowMs += 1) t.mock.timers.tick(1);
  assert.ok(many.sent + single.sent > 2_900_000);
  assert.ok(Math.abs(many.sent - single.sent) <= limiter.quantumBytes, `${many.sent}, ${single.sent}`);
});

test('a new rate takes effect for those who wait', (t) => {
  t.mock.timers.enable({ apis: ['setTimeout'] });
  const limiter = new RateLimiter(8, { nowMs: () => 0 });
  let granted = 0;
  for (let each = 0; each < 5; each += 1) limiter.request(1000, () => granted++);
  assert.equal(granted, 0);
  limiter.setRate(null);
  assert.equal(granted, 5);
});

test('a withdrawn request is not granted and leaves no timer', (t) => {
  t.mock.timers.enable({ apis: ['setTimeout'] });
  const limiter = new RateLimiter(8, { nowMs: () => 0 });
  let granted = 0;
  const withdraw = limiter.request(1000, () => granted++);
  withdraw();
  limiter.setRate(null);
  assert.equal(granted, 0);
});

test('rates and limits that make no sense are refused', () => {
  for (const rate of [0, -1, Number.NaN, Number.POSITIVE_INFINITY]) {
    assert.throws(() => new RateLimiter(rate), isInvalid);
  }
  assert.throws(() => resolveLimits({ pingMs: 0 }), isInvalid);
  assert.throws(() => resolveLimits({ giveUpMs: 2 ** 40 }), isInvalid);
  assert.equal(resolveLimits({ maxWindowBytes: 1000 }).initialWindowBytes, 1000);
});

const isInvalid = (error: unknown) => error instanceof AppError && error.code === 'invalid_request';

test('however a sender cuts its frames, what waits for the reader costs little more than the window', () => {
  const windowBytes = 64 * KiB;
  const limits = { ...defaultLimits, initialWindowBytes: windowBytes, maxWindowBytes: windowBytes };
  fuzz(
    fc.property(
      fc.infiniteStream(fc.integer({ min: 1, max: 3000 })),
      fc.integer({ min: 3000, max: 20_000 }),
      (sizes, chunkBytes) => {
        const receiver = new Receiver(limits, () => {});
        for (let offset = 0; ; ) {
          // Each piece is a view of a network buffer that holds nothing else of the stream.
          const bytes = new Uint8Array(chunkBytes).subarray(0, sizes.next().value);
          if (receiver.onData(offset, bytes) !== undefined) break;
          offset += bytes.length;
        }
        assert.ok(receiver.waitingBytes <= windowBytes);
        const buffers = new Set<ArrayBufferLike>();
        for (let bytes = receiver.next(1); bytes; bytes = receiver.next(1)) buffers.add(bytes.buffer);
        const costBytes = [...buffers].reduce((sum, each) => sum + each.byteLength, 0);
        assert.ok(
          costBytes <= 4 * windowBytes + 32 * KiB,
          `${costBytes} bytes for a window of ${windowBytes}`,
        );
        receiver.clear();
      },
    ),
    50,
  );
});
