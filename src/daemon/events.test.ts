import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { setImmediate as nextTurn } from 'node:timers/promises';
import fc from 'fast-check';
import type { EventRecord } from '../model/operation.ts';
import { EventLog, type EventLogOptions } from './events.ts';
import { testStore } from './store/fixtures.ts';
import type { StoreOptions } from './store/index.ts';

function testLog(options: EventLogOptions & StoreOptions = {}) {
  const fixture = testStore(options);
  const log = new EventLog(fixture.store, options);
  return { ...fixture, log, append: (n: number) => log.append({ kind: 'test', data: { n } }) };
}

/** Reads until `count` events came or the stream ended. */
async function take(stream: AsyncIterable<EventRecord>, count: number): Promise<EventRecord[]> {
  const events: EventRecord[] = [];
  for await (const event of stream) {
    events.push(event);
    if (events.length === count) break;
  }
  return events;
}

const numbers = (events: EventRecord[]) => events.map(({ data }) => data.n);

describe('a subscriber', () => {
  test('is given what is stored and then what is new, each once and in order', async () => {
    using fixture = testLog();
    fixture.append(1);
    fixture.append(2);
    const reading = take(fixture.log.subscribe({ afterId: 1 }), 3);
    fixture.append(3);
    await nextTurn();
    fixture.append(4);
    assert.deepEqual(numbers(await reading), [2, 3, 4]);
  });

  test('without a start sees only what comes after the call', async () => {
    using fixture = testLog();
    fixture.append(1);
    const stream = fixture.log.subscribe();
    fixture.append(2);
    assert.deepEqual(numbers(await take(stream, 1)), [2]);
  });

  test('misses nothing and sees nothing twice, however appends and reads interleave and wherever it resumes', async () => {
    await fc.assert(
      fc.asyncProperty(
        fc.scheduler(),
        fc.array(fc.integer({ min: 1, max: 150 }), { minLength: 1, maxLength: 6 }),
        fc.integer({ min: 1, max: 40 }),
        async (scheduler, bursts, leaveAfter) => {
          using fixture = testLog();
          const total = bursts.reduce((sum, burst) => sum + burst, 0);
          let appended = 0;
          for (const burst of bursts) {
            scheduler.schedule(Promise.resolve(), 'append').then(() => {
              fixture.store.transact(() => {
                for (let i = 0; i < burst; i += 1) fixture.append(++appended);
              });
            });
          }
          const seen: EventRecord[] = [];
          const reading = (async () => {
            while (seen.length < total) {
              const stream = fixture.log.subscribe({ afterId: seen.at(-1)?.id ?? 0 });
              let read = 0;
              for await (const event of stream) {
                seen.push(event);
                read += 1;
                if (seen.length === total || read === leaveAfter) break;
                if (read % 7 === 0) await scheduler.schedule(Promise.resolve(), 'read');
              }
            }
          })();
          await scheduler.waitFor(reading);
          assert.deepEqual(
            numbers(seen),
            Array.from({ length: total }, (_, index) => index + 1),
          );
        },
      ),
      { numRuns: 20 },
    );
  });

  test('is told of a gap when what it asks for is gone, and can resume from there', async () => {
    using fixture = testLog({ keepEvents: 50 });
    for (let n = 1; n <= 200; n += 1) fixture.append(n);
    const [gap, first] = await take(fixture.log.subscribe({ afterId: 10 }), 2);
    assert.equal(gap!.kind, 'gap');
    assert.deepEqual(gap!.data, { afterId: 10 });
    assert.equal(first!.id, gap!.id + 1);
    const [resumed] = await take(fixture.log.subscribe({ afterId: gap!.id }), 1);
    assert.deepEqual(resumed, first);
  });

  test('is told of a gap when its id is from another log', async () => {
    using fixture = testLog();
    fixture.append(1);
    const [gap, first] = await take(fixture.log.subscribe({ afterId: 99 }), 2);
    assert.deepEqual([gap!.kind, gap!.id, first!.data.n], ['gap', 0, 1]);
  });

  test('that was up to date and falls too far behind is ended with a reason, and can resume', async () => {
    using fixture = testLog({ maxLag: 10 });
    const stream = fixture.log.subscribe({ afterId: 0 });
    fixture.append(1);
    assert.deepEqual(numbers([(await stream.next()).value!]), [1]);
    for (let n = 2; n <= 20; n += 1) fixture.append(n);
    const [end, ...more] = await take(stream, 2);
    assert.deepEqual([end!.kind, end!.id, end!.data, more], ['end', 1, { reason: 'too_slow' }, []]);
    assert.equal((await take(fixture.log.subscribe({ afterId: end!.id }), 19)).length, 19);
  });

  test('that replays a long history is not too slow', async () => {
    using fixture = testLog({ maxLag: 10 });
    for (let n = 1; n <= 300; n += 1) fixture.append(n);
    assert.equal((await take(fixture.log.subscribe({ afterId: 0 }), 300)).at(-1)!.data.n, 300);
  });

  test('that aborts is let go', async () => {
    using fixture = testLog();
    const abort = new AbortController();
    const reading = take(fixture.log.subscribe({ signal: abort.signal }), 1);
    await nextTurn();
    assert.equal(fixture.log.subscriberCount, 1);
    abort.abort();
    assert.deepEqual(await reading, []);
    assert.equal(fixture.log.subscriberCount, 0);
  });

  test('is refused when too many are open', async () => {
    using fixture = testLog({ maxSubscribers: 1 });
    const reading = take(fixture.log.subscribe(), 1);
    assert.throws(() => fixture.log.subscribe(), { code: 'too_many' });
    fixture.append(1);
    await reading;
    fixture.log.subscribe();
  });

  test('is told when the log closes', async () => {
    using fixture = testLog();
    const reading = take(fixture.log.subscribe(), 9);
    await nextTurn();
    fixture.log.close();
    assert.deepEqual(
      (await reading).map(({ kind, data }) => [kind, data.reason]),
      [['end', 'closing']],
    );
  });
});

describe('an event', () => {
  test('of a transaction that is rolled back was never there', async () => {
    using fixture = testLog();
    const reading = take(fixture.log.subscribe(), 1);
    assert.throws(() =>
      fixture.store.transact(() => {
        fixture.append(1);
        throw new Error('no');
      }),
    );
    await nextTurn();
    fixture.append(2);
    assert.deepEqual(numbers(await reading), [2]);
  });

  test('replaces the one before with the same key, and that is no gap', async () => {
    using fixture = testLog();
    for (let n = 1; n <= 5; n += 1) fixture.log.append({ kind: 'p', data: { n }, latestOf: 'k' });
    fixture.append(6);
    assert.deepEqual(numbers(await take(fixture.log.subscribe({ afterId: 1 }), 2)), [5, 6]);
  });

  test('keeps its id for ever: a reopened log goes on counting', () => {
    using fixture = testLog();
    const { id } = fixture.log.append({ kind: 'a', data: {}, latestOf: 'k' });
    const log = new EventLog(fixture.store);
    assert.equal(log.append({ kind: 'b', data: {}, latestOf: 'k' }).id, id + 1);
  });
});
