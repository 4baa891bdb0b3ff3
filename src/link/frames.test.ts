import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { FrameDecoder } from './frame-decoder.ts';
import { encodeFrame, encodeRun } from './frame-encoder.ts';
import { type Frame, frameTypes, maxDataBytes, maxMetadataBytes, refuseReasons } from './frames.ts';
import { fuzz } from './fuzz.ts';

const offset = fc.maxSafeNat().map((value) => Math.max(0, value - maxDataBytes - 1));
const position = { received: offset, limit: offset };
const why = { code: fc.constantFrom('cancelled', 'internal'), message: fc.string({ maxLength: 300 }) };
const token = fc.nat({ max: 2 ** 32 - 1 });

const anyFrame: fc.Arbitrary<Frame> = fc.oneof(
  fc.record({
    type: fc.constant('hello' as const),
    kind: fc.constantFrom('open' as const, 'resume' as const),
    attempt: token,
    sessionId: fc.uint8Array({ minLength: 16, maxLength: 16 }).map((id) => Buffer.from(id).toString('hex')),
    secret: fc.uint8Array({ minLength: 32, maxLength: 32 }),
    ...position,
    metadata: fc.dictionary(fc.string(), fc.string(), { maxKeys: 5, noNullPrototype: true }),
  }),
  fc.record({ type: fc.constantFrom('welcome' as const, 'ack' as const), ...position }),
  fc.record({ type: fc.constant('refuse' as const), reason: fc.constantFrom(...refuseReasons), ...why }),
  fc.record({
    type: fc.constant('data' as const),
    offset,
    bytes: fc.uint8Array({ minLength: 1, maxLength: 5000 }),
  }),
  fc.record({ type: fc.constantFrom('ping' as const, 'pong' as const), token }),
  fc.record({ type: fc.constant('end' as const), offset }),
  fc.record({ type: fc.constant('reset' as const), ...why }),
  fc.constant({ type: 'done' as const }),
);

function encode(frame: Frame): Buffer {
  if (frame.type !== 'data') return encodeFrame(frame);
  return Buffer.concat(encodeRun({ offset: frame.offset, bytes: frame.bytes, withRoom: undefined }));
}

/** All frames of these chunks, pieces of DATA that follow each other joined, up to the first refusal. */
function decode(chunks: Iterable<Uint8Array>) {
  const decoder = new FrameDecoder();
  const frames: Frame[] = [];
  for (const chunk of chunks) {
    const decoded = decoder.push(chunk);
    for (const frame of decoded.frames) {
      const last = frames.at(-1);
      const continues =
        frame.type === 'data' && last?.type === 'data' && last.offset + last.bytes.length === frame.offset;
      if (continues) last.bytes = Buffer.concat([last.bytes, frame.bytes]);
      else frames.push({ ...frame });
    }
    if (decoded.refused) return { frames, refused: decoded.refused };
  }
  return { frames, refused: undefined };
}

const plain = (frames: Frame[]) =>
  frames.map((frame) => ({
    ...frame,
    ...('bytes' in frame ? { bytes: [...frame.bytes] } : {}),
    ...('secret' in frame ? { secret: [...frame.secret] } : {}),
  }));

function chop(bytes: Uint8Array, sizes: fc.Stream<number>): Uint8Array[] {
  const chunks: Uint8Array[] = [];
  for (let at = 0; at < bytes.length; ) {
    const size = sizes.next().value + 1;
    chunks.push(bytes.subarray(at, at + size));
    at += size;
  }
  return chunks;
}

const oneOfEach: Frame[] = [
  {
    type: 'hello',
    kind: 'open',
    attempt: 7,
    sessionId: '00112233445566778899aabbccddeeff',
    secret: new Uint8Array(32).fill(9),
    received: 2 ** 40,
    limit: 2 ** 40 + 5,
    metadata: { ticket: 'x' },
  },
  { type: 'welcome', received: 1, limit: 2 },
  { type: 'refuse', reason: 'rejected', code: 'cancelled', message: 'no' },
  { type: 'data', offset: 2 ** 35, bytes: new Uint8Array([1, 2, 3]) },
  { type: 'ack', received: 3, limit: 4 },
  { type: 'ping', token: 5 },
  { type: 'pong', token: 6 },
  { type: 'end', offset: 2 ** 35 + 3 },
  { type: 'reset', code: 'internal', message: 'oh' },
  { type: 'done' },
];

test('the example holds every type of frame', () => {
  assert.deepEqual(
    oneOfEach.map(({ type }) => type),
    frameTypes,
  );
});

test('the bytes are those of FORMAT.md', () => {
  assert.equal(encode(oneOfEach[3]!).toString('hex'), '0400000b 0000000800000000 010203'.replaceAll(' ', ''));
  assert.equal(encode(oneOfEach[4]!).toString('hex'), '0500001000000000000000030000000000000004');
  assert.equal(encode(oneOfEach[5]!).toString('hex'), '0600000400000005');
  assert.equal(encode(oneOfEach[9]!).toString('hex'), '0a000000');
});

test('whatever frames are sent in whatever chunks, the same frames arrive', () => {
  fuzz(
    fc.property(fc.array(anyFrame), fc.infiniteStream(fc.nat(40)), (frames, sizes) => {
      const decoded = decode(chop(Buffer.concat(frames.map(encode)), sizes));
      assert.equal(decoded.refused, undefined);
      // DATA frames that happen to follow each other are joined on both sides.
      const wanted = decode(frames.map(encode));
      assert.deepEqual(plain(decoded.frames), plain(wanted.frames));
    }),
    300,
  );
});

test('one byte at a time gives the same frames as all at once', () => {
  const bytes = Buffer.concat(oneOfEach.map(encode));
  const wanted = { frames: plain(oneOfEach), refused: undefined };
  const whole = decode([bytes]);
  const single = decode(Array.from(bytes, (byte) => Uint8Array.of(byte)));
  assert.deepEqual({ ...whole, frames: plain(whole.frames) }, wanted);
  assert.deepEqual({ ...single, frames: plain(single.frames) }, wanted);
});

test('a stream that is cut at any byte gives the whole frames before the cut and the begun part of DATA', () => {
  for (const frame of oneOfEach) {
    const bytes = encode(frame);
    for (let end = 0; end < bytes.length; end += 1) {
      const { frames, refused } = decode([bytes.subarray(0, end)]);
      assert.equal(refused, undefined);
      const begun = frame.type === 'data' ? Math.max(0, end - 12) : 0;
      assert.equal(frames.length, begun > 0 ? 1 : 0);
    }
  }
});

test('one flipped bit gives frames within the bounds or a named refusal, never a crash', () => {
  const bytes = Buffer.concat(oneOfEach.map(encode));
  for (let bit = 0; bit < bytes.length * 8; bit += 1) {
    const damaged = Buffer.from(bytes);
    damaged[bit >> 3]! ^= 1 << (bit & 7);
    const { frames, refused } = decode([damaged]);
    assert.ok(refused === undefined || typeof refused === 'string');
    for (const frame of frames) {
      if ('offset' in frame) assert.ok(Number.isSafeInteger(frame.offset));
      if ('limit' in frame)
        assert.ok(Number.isSafeInteger(frame.limit) && Number.isSafeInteger(frame.received));
    }
  }
});

test('random bytes never throw, and never make the decoder hold more than one small frame', () => {
  fuzz(
    fc.property(fc.array(fc.uint8Array({ maxLength: 80 })), fc.boolean(), (chunks, likely) => {
      const decoder = new FrameDecoder();
      for (const chunk of chunks) {
        // Types and lengths that exist, so that more than the first byte is tried.
        if (likely && chunk.length > 3) chunk.set([1 + (chunk[0]! % 10), 0, 0]);
        decoder.push(chunk);
        assert.ok(decoder.heldBytes <= maxMetadataBytes + 100);
      }
    }),
    2000,
  );
});

test('a length or an offset that nobody needs is refused at once', () => {
  const cases = [
    // The longest length that fits into the header, for each type.
    ...frameTypes.map((_, index) => [[index + 1, 0xff, 0xff, 0xff], 'bad_length'] as const),
    // 2^63 and 2^53 as offsets of DATA and END.
    [[4, 0, 0, 9, 0x80, 0, 0, 0, 0, 0, 0, 0], 'bad_offset'],
    [[4, 0, 0, 9, 0, 0x20, 0, 0, 0, 0, 0, 0], 'bad_offset'],
    [[8, 0, 0, 8, 0x80, 0, 0, 0, 0, 0, 0, 0], 'bad_offset'],
    [[5, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0x80, 0, 0, 0, 0, 0, 0, 0], 'bad_offset'],
    // DATA whose last byte would lie beyond 2^53.
    [[4, 0, 0, 10, 0, 0x1f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff], 'bad_offset'],
    [[0, 0, 0, 0], 'unknown_type'],
    [[11, 0, 0, 0], 'unknown_type'],
    [[10, 0, 0, 1], 'bad_length'],
    [[4, 0, 0, 8], 'bad_length'],
    [[3, 0, 0, 3, 1, 0x7b, 0x7d], 'bad_value'],
    [[9, 0, 0, 2, 0x5b, 0x5d], 'not_an_object'],
    [[9, 0, 0, 2, 0x7b, 0x7b], 'not_json'],
    [[9, 0, 0, 2, 0xff, 0xfe], 'not_utf8'],
  ] as const;
  for (const [bytes, refused] of cases) {
    assert.deepEqual(decode([Uint8Array.from(bytes)]), { frames: [], refused }, bytes.join(' '));
  }
});

test('after a refusal nothing is taken any more', () => {
  const decoder = new FrameDecoder();
  decoder.push(Uint8Array.of(0, 0, 0, 0));
  assert.deepEqual(decoder.push(encodeFrame({ type: 'done' })), { frames: [], refused: 'closed' });
});

test('a reason of any length is cut to what a frame holds', () => {
  for (const message of ['x'.repeat(10_000), '\u0000'.repeat(10_000), '\u{1f40d}'.repeat(3000)]) {
    const { frames, refused } = decode([encodeFrame({ type: 'reset', code: 'internal', message })]);
    assert.equal(refused, undefined);
    assert.equal(frames[0]?.type, 'reset');
  }
});

test('a large payload is written as it is, a small one behind its header, and one with room with no copy at all', () => {
  const large = Buffer.alloc(100_000);
  const [header, payload] = encodeRun({ offset: 0, bytes: large, withRoom: undefined });
  assert.equal(header?.length, 12);
  assert.equal(payload, large);
  const small = { offset: 300, bytes: Buffer.from('a'), withRoom: undefined };
  const whole = encodeRun(small);
  assert.equal(whole.length, 1);
  const withRoom = Buffer.alloc(13, 'a');
  assert.deepEqual(encodeRun({ ...small, bytes: withRoom.subarray(12), withRoom }), whole);
});
