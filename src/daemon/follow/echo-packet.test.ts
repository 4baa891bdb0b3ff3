import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { decodePacket, type EchoPacket, encodePacket, keyFor, packetBytes } from './echo-packet.ts';

const key = keyFor(Buffer.alloc(32, 1), '00000000-0000-4000-8000-000000000001');
const packets: fc.Arbitrary<EchoPacket> = fc.record({
  kind: fc.constantFrom('question', 'answer'),
  askerId: fc.uuid(),
  nonce: fc.uint8Array({ minLength: 16, maxLength: 16 }).map((bytes) => Buffer.from(bytes).toString('hex')),
});

test('a packet comes out as it went in, and an answer is as long as its question', () => {
  fc.assert(
    fc.property(packets, (packet) => {
      const bytes = encodePacket(packet, key);
      assert.equal(bytes.length, packetBytes);
      assert.deepEqual(
        decodePacket(bytes, () => key),
        { ...packet },
      );
    }),
  );
});

test('one flipped bit, another length or another key makes it no packet', () => {
  const bytes = encodePacket(
    { kind: 'question', askerId: '00000000-0000-4000-8000-000000000002', nonce: 'ab'.repeat(16) },
    key,
  );
  for (let bit = 0; bit < packetBytes * 8; bit += 1) {
    const damaged = Buffer.from(bytes);
    damaged[bit >> 3]! ^= 1 << (bit & 7);
    assert.equal(
      decodePacket(damaged, () => key),
      undefined,
      `bit ${bit}`,
    );
  }
  for (let length = 0; length < packetBytes; length += 1)
    assert.equal(
      decodePacket(bytes.subarray(0, length), () => key),
      undefined,
    );
  assert.equal(
    decodePacket(bytes, () => Buffer.alloc(32)),
    undefined,
  );
  assert.equal(
    decodePacket(bytes, () => undefined),
    undefined,
  );
});

test('random bytes are no packet', () => {
  fc.assert(
    fc.property(fc.uint8Array({ maxLength: 100 }), (bytes) => {
      assert.equal(
        decodePacket(Buffer.from(bytes), () => key),
        undefined,
      );
    }),
  );
});
