import assert from 'node:assert/strict';
import { createSocket } from 'node:dgram';
import { once } from 'node:events';
import { test } from 'node:test';
import { newId } from '../../model/ids.ts';
import { Echo } from './echo.ts';

const [north, south] = [newId(), newId()];
const pace = { count: 3, gapMs: 1, timeoutMs: 5000 };

async function pair() {
  const stack = new AsyncDisposableStack();
  const a = stack.use(new Echo({ ownId: north, isPeer: (id) => id === south }));
  const b = stack.use(new Echo({ ownId: south, isPeer: (id) => id === north }));
  await a.listen({ host: '127.0.0.1', port: 0 });
  await b.listen({ host: '127.0.0.1', port: 0 });
  const toB = { address: '127.0.0.1', port: b.port!, key: b.keyFor(north) };
  return { stack, a, b, toB };
}

test('a peer answers each probe', async () => {
  const { stack, a, toB } = await pair();
  await using _ = stack;
  const answers = await a.probe(toB, pace);
  assert.equal(answers.length, 3);
  for (const each of answers) assert.ok(typeof each === 'number' && each > 0, String(each));
});

test('who shows another key, or is no peer, gets no answer', async () => {
  const { stack, a, b, toB } = await pair();
  await using _ = stack;
  const soon = { ...pace, timeoutMs: 100 };
  assert.deepEqual(await a.probe({ ...toB, key: Buffer.alloc(32) }, soon), ['lost', 'lost', 'lost']);
  await using stranger = new Echo({ ownId: newId(), isPeer: () => true });
  await stranger.listen({ host: '127.0.0.1', port: 0 });
  assert.deepEqual(await stranger.probe({ ...toB, key: b.keyFor(newId()) }, soon), ['lost', 'lost', 'lost']);
  assert.equal(typeof (await a.probe(toB, { ...pace, count: 1 }))[0], 'number');
});

test('an answer that comes before the question was heard is not believed', async () => {
  const { stack, a, b } = await pair();
  await using _ = stack;
  // A liar that echoes what it gets, without the key, as fast as it can.
  const liar = createSocket('udp4').bind(0, '127.0.0.1');
  await once(liar, 'listening');
  stack.defer(() => void liar.close());
  liar.on('message', (bytes, from) => {
    bytes[4] = 2;
    liar.send(bytes, from.port, from.address);
  });
  const target = { address: '127.0.0.1', port: liar.address().port, key: b.keyFor(north) };
  assert.deepEqual(await a.probe(target, { count: 1, gapMs: 0, timeoutMs: 200 }), ['lost']);
});

test('a port that is taken is replaced by a free one', async () => {
  const { stack, b } = await pair();
  await using _ = stack;
  await using other = new Echo({ ownId: north, isPeer: () => false });
  await other.listen({ host: '127.0.0.1', port: b.port! });
  assert.notEqual(other.port, b.port);
});
