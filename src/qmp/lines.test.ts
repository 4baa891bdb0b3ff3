import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { encodeLine, JsonLineDecoder, type JsonObject } from './lines.ts';

const bytes = (text: string): Buffer => Buffer.from(text);

/** Every message, and the first refusal, that the decoder gives for these chunks. */
function decode(chunks: Uint8Array[], maxLineBytes = 1000) {
  const decoder = new JsonLineDecoder(maxLineBytes);
  const messages: JsonObject[] = [];
  for (const chunk of chunks) {
    const decoded = decoder.push(chunk);
    messages.push(...decoded.messages);
    if (decoded.refused) return { messages, refused: decoded.refused };
  }
  return { messages, refused: undefined };
}

test('one byte at a time gives the same objects as all at once', () => {
  const stream = bytes('{"a":1}\r\n\r\n{"b":"\u{1f40d}"}\n');
  const wanted = { messages: [{ a: 1 }, { b: '\u{1f40d}' }], refused: undefined };
  assert.deepEqual(decode([stream]), wanted);
  assert.deepEqual(decode(Array.from(stream, (byte) => Uint8Array.of(byte))), wanted);
});

test('a caller may reuse the buffer that it pushed', () => {
  const decoder = new JsonLineDecoder(100);
  const buffer = bytes('{"a":');
  decoder.push(buffer);
  buffer.fill(0);
  assert.deepEqual(decoder.push(bytes('1}\n')).messages, [{ a: 1 }]);
});

test('a truncated line gives nothing, wherever it is cut', () => {
  const line = bytes('{"return":{},"id":1}\n');
  for (let end = 0; end < line.length; end += 1) {
    assert.deepEqual(decode([line.subarray(0, end)]), { messages: [], refused: undefined });
  }
});

test('each kind of garbage is refused by its name, after the good lines before it', () => {
  const good = bytes('{"a":1}\n');
  const cases = [
    [bytes('nonsense\n'), 'not_json'],
    [bytes('[1]\n'), 'not_an_object'],
    [bytes('null\n'), 'not_an_object'],
    [Buffer.from([0xff, 0xfe, 0x0a]), 'not_utf8'],
    [bytes(`"${'x'.repeat(2000)}`), 'too_long'],
  ] as const;
  for (const [garbage, refused] of cases) {
    assert.deepEqual(decode([Buffer.concat([good, garbage])]), { messages: [{ a: 1 }], refused });
  }
});

test('a line may be as long as the bound and not a byte longer', () => {
  const line = bytes('{"a":1}');
  const chunks = [line, bytes('\n')];
  assert.equal(decode(chunks, line.length).messages.length, 1);
  assert.equal(decode(chunks, line.length - 1).refused, 'too_long');
});

test('after a refusal nothing is taken any more', () => {
  const decoder = new JsonLineDecoder(100);
  decoder.push(bytes('x\n'));
  assert.deepEqual(decoder.push(bytes('{"a":1}\n')), { messages: [], refused: 'closed' });
});

test('whatever objects are sent in whatever chunks, the same objects arrive', () => {
  const seed = Number(process.env.SEED ?? Date.now() % 2 ** 31);
  console.log(`fuzz seed ${seed} (repeat with SEED=${seed})`);
  fc.assert(
    fc.property(
      fc.array(fc.dictionary(fc.string(), fc.jsonValue())),
      fc.infiniteStream(fc.nat(20)),
      (objects, sizes) => {
        const stream = bytes(objects.map(encodeLine).join(''));
        const chunks: Uint8Array[] = [];
        for (let at = 0; at < stream.length; ) {
          const size = sizes.next().value + 1;
          chunks.push(stream.subarray(at, at + size));
          at += size;
        }
        const decoded = decode(chunks, 1_000_000);
        assert.equal(decoded.refused, undefined);
        assert.deepEqual(decoded.messages, JSON.parse(JSON.stringify(objects)));
      },
    ),
    { seed, numRuns: 200 },
  );
});

test('random bytes never throw', () => {
  const seed = Number(process.env.SEED ?? Date.now() % 2 ** 31);
  console.log(`fuzz seed ${seed} (repeat with SEED=${seed})`);
  fc.assert(
    fc.property(fc.array(fc.uint8Array({ maxLength: 50 })), (chunks) => {
      decode(chunks, 30);
    }),
    { seed, numRuns: 500 },
  );
});
