import assert from 'node:assert/strict';
import { duplexPair } from 'node:stream';
import { test } from 'node:test';
import fc from 'fast-check';
import { AppError } from '../model/errors.ts';
import { fuzz } from './fuzz.ts';
import type { JsonObject } from './json.ts';
import { encodeMessage, MessageDecoder, messages } from './messages.ts';

test('whatever messages are sent in whatever chunks, the same messages arrive', () => {
  fuzz(
    fc.property(
      fc.array(fc.dictionary(fc.string(), fc.jsonValue(), { noNullPrototype: true })),
      fc.infiniteStream(fc.nat(20)),
      (objects, sizes) => {
        const bytes = Buffer.concat(objects.map((each) => encodeMessage(each)));
        const decoder = new MessageDecoder();
        const decoded: JsonObject[] = [];
        for (let at = 0; at < bytes.length; ) {
          const size = sizes.next().value + 1;
          const { messages: whole, refused } = decoder.push(bytes.subarray(at, at + size));
          assert.equal(refused, undefined);
          decoded.push(...whole);
          at += size;
        }
        assert.deepEqual(decoded, JSON.parse(JSON.stringify(objects)));
        assert.equal(decoder.isMidMessage, false);
      },
    ),
    200,
  );
});

test('random bytes never throw', () => {
  fuzz(
    fc.property(fc.array(fc.uint8Array({ maxLength: 50 })), (chunks) => {
      const decoder = new MessageDecoder(1000);
      for (const chunk of chunks) {
        if (chunk.length > 4) chunk.set([0, 0, 0]);
        decoder.push(chunk);
      }
    }),
    500,
  );
});

test('each kind of garbage is refused by its name, after the good messages before it', () => {
  const good = encodeMessage({ a: 1 });
  const cases = [
    [[0xff, 0xff, 0xff, 0xff], 'too_long'],
    [[0, 0, 0, 0], 'not_json'],
    [[0, 0, 0, 2, 0x5b, 0x5d], 'not_an_object'],
    [[0, 0, 0, 1, 0x7b], 'not_json'],
    [[0, 0, 0, 1, 0xff], 'not_utf8'],
  ] as const;
  for (const [garbage, refused] of cases) {
    const decoder = new MessageDecoder();
    assert.deepEqual(decoder.push(Buffer.concat([good, Buffer.from(garbage)])), {
      messages: [{ a: 1 }],
      refused,
    });
    assert.deepEqual(decoder.push(good), { messages: [], refused: 'closed' });
  }
});

test('messages go both ways, and leaving a loop loses none', async () => {
  const [here, there] = duplexPair();
  const client = messages(here);
  const server = messages(there);
  // A pair takes a write when the other end reads.
  const sent = Promise.all([1, 2, 3].map((n) => client.send({ n })));
  for await (const message of server) {
    assert.deepEqual(message, { n: 1 });
    break;
  }
  assert.deepEqual((await server.next()).value, { n: 2 });
  const answer = server.send({ answer: true });
  assert.deepEqual((await client.next()).value, { answer: true });
  const end = client.end();
  const rest: JsonObject[] = [];
  for await (const message of server) rest.push(message);
  assert.deepEqual(rest, [{ n: 3 }]);
  await Promise.all([sent, answer, end]);
});

test('a message that is too long is refused before it is sent, and one that is cut off when it is read', async () => {
  const [here, there] = duplexPair();
  const client = messages(here, { maxBytes: 100 });
  await assert.rejects(
    async () => client.send({ text: 'x'.repeat(200) }),
    (error) => error instanceof AppError && error.code === 'payload_too_large',
  );
  here.end(encodeMessage({ a: 1 }).subarray(0, -1));
  await assert.rejects(
    messages(there).next(),
    (error) => error instanceof AppError && error.details.reason === 'protocol',
  );
});

test('send and end fail with the error that ended the session', async () => {
  const [here] = duplexPair();
  const client = messages(here);
  here.on('error', () => {});
  const reason = new AppError('cancelled', 'enough');
  here.destroy(reason);
  await assert.rejects(client.send({}), reason);
  await assert.rejects(client.end(), reason);
});
