import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { test } from 'node:test';
import { encodeEscrow, parseEscrow } from './escrow.ts';

const escrow = {
  facts: Buffer.from('{}'),
  manifest: randomBytes(1000),
  whole: { opening: randomBytes(40), tail: Buffer.alloc(0) },
};

test('an escrow comes back as it was given, and not when a byte is missing or too many', () => {
  const bytes = encodeEscrow(escrow);
  assert.deepEqual(parseEscrow(bytes), escrow);
  for (let length = 0; length < bytes.length; length++)
    assert.throws(() => parseEscrow(bytes.subarray(0, length)), { code: 'peer_unreachable' });
  assert.throws(() => parseEscrow(Buffer.concat([bytes, Buffer.of(0)])), /1 bytes too many/);
});
