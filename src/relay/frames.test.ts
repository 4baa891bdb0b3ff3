import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { readFileSync } from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';
import fc from 'fast-check';
import { newId } from '../model/ids.ts';
import {
  type ClientFrame,
  encodeFrame,
  FrameReader,
  frame,
  maxSlabBytes,
  type RelayFrame,
  slabDigestBytes,
} from './frames.ts';

const slab = fc.integer({ min: 1, max: 2 ** 32 - 1 });
const bytes = fc.uint8Array({ minLength: 1, maxLength: 5000 }).map((each) => Buffer.from(each));
const freeBytes = fc.integer({ min: 0, max: Number.MAX_SAFE_INTEGER });
const to = fc.nat().map(() => newId());
const digest = fc
  .uint8Array({ minLength: slabDigestBytes, maxLength: slabDigestBytes })
  .map((each) => Buffer.from(each));
const group = digest.map((each) => each.toString('hex'));
const fromClient: fc.Arbitrary<ClientFrame> = fc.oneof(
  fc.record({ name: fc.constant('put' as const), slab, bytes }, { noNullPrototype: true }),
  fc.record(
    {
      name: fc.constant('get' as const),
      tag: fc.nat(),
      slab,
      urgent: fc.boolean(),
      at: fc.integer({ min: 0, max: 1000 }),
      length: fc.integer({ min: 1, max: 1e6 }),
    },
    { noNullPrototype: true },
  ),
  fc.constant({ name: 'drop' as const }),
  fc.constant({ name: 'keep' as const }),
  fc.record({ name: fc.constant('pass' as const), slab, to }, { noNullPrototype: true }),
  fc.record({ name: fc.constant('expect' as const), slab, digest }, { noNullPrototype: true }),
  fc.record({ name: fc.constant('share' as const), slab, group }, { noNullPrototype: true }),
);
const fromRelay: fc.Arbitrary<RelayFrame> = fc.oneof(
  fc.constant({ name: 'kept' as const }),
  fc.record(
    { name: fc.constant('free' as const), freeBytes, canShare: fc.boolean() },
    { requiredKeys: ['name', 'freeBytes'], noNullPrototype: true },
  ),
  fc.record(
    { name: fc.constantFrom('held' as const, 'full' as const), slab, freeBytes },
    { noNullPrototype: true },
  ),
  fc.record({ name: fc.constant('slab' as const), tag: fc.nat(), bytes }, { noNullPrototype: true }),
  fc.record({ name: fc.constant('absent' as const), tag: fc.nat() }, { noNullPrototype: true }),
  fc.record(
    { name: fc.constant('passed' as const), slab, to, isTaken: fc.boolean() },
    { noNullPrototype: true },
  ),
  fc.record(
    { name: fc.constant('here' as const), slab, isRight: fc.boolean(), freeBytes },
    { noNullPrototype: true },
  ),
);

/** All frames out of the pieces; their bytes copied. */
function readAll(side: 'client' | 'relay', pieces: readonly Buffer[]) {
  const reader = new FrameReader(side);
  const frames: (ClientFrame | RelayFrame)[] = [];
  for (const piece of pieces) {
    reader.push(piece);
    for (let next = reader.next(); next; next = reader.next())
      frames.push('bytes' in next ? { ...next, bytes: Buffer.from(next.bytes) } : next);
  }
  return frames;
}

for (const side of ['client', 'relay'] as const)
  test(`frames of a ${side} come out as they went in, however they are cut`, () => {
    const frames: fc.Arbitrary<ClientFrame | RelayFrame> = side === 'client' ? fromClient : fromRelay;
    fc.assert(
      fc.property(fc.array(frames, { maxLength: 8 }), fc.integer({ min: 1, max: 700 }), (given, step) => {
        const wire = Buffer.concat(given.flatMap(encodeFrame));
        const pieces = [];
        for (let at = 0; at < wire.length; at += step) pieces.push(wire.subarray(at, at + step));
        assert.deepEqual(readAll(side, pieces), given);
      }),
      { numRuns: 60 },
    );
  });

test('a frame that is cut short is none', () => {
  const wire = Buffer.concat(encodeFrame({ name: 'held', slab: 7, freeBytes: 2 ** 40 }));
  for (let end = 0; end < wire.length; end++) assert.deepEqual(readAll('relay', [wire.subarray(0, end)]), []);
});

test('what no client and no relay sends is refused, by its head where that says it', () => {
  const word = (value: number): Buffer => {
    const four = Buffer.alloc(4);
    four.writeUInt32BE(value);
    return four;
  };
  const get = (slab: number, urgent: number, at: number, length: number): Buffer =>
    Buffer.concat([
      Buffer.of(frame.get),
      word(17),
      word(9),
      word(slab),
      Buffer.of(urgent),
      word(at),
      word(length),
    ]);
  const wrong: Record<string, ['client' | 'relay', Buffer]> = {
    'an unknown type': ['client', Buffer.of(9, 0, 0, 0, 0)],
    'a frame of the other side': ['client', Buffer.of(frame.free, 0, 0, 0, 8)],
    'a slab that is too large': ['client', Buffer.concat([Buffer.of(frame.put), word(maxSlabBytes + 5)])],
    'an empty slab': ['relay', Buffer.concat([Buffer.of(frame.slab), word(4)])],
    'slab 0': ['client', Buffer.concat([Buffer.of(frame.put), word(5), word(0), Buffer.of(0)])],
    'an urgency of 2': ['client', get(1, 2, 0, 5)],
    'a 2 for a yes or no': [
      'relay',
      Buffer.concat([Buffer.of(frame.here), word(13), word(7), Buffer.of(2), Buffer.alloc(8)]),
    ],
    'a range of nothing': ['client', get(1, 1, 5, 0)],
    'a range behind the end': ['client', get(1, 1, maxSlabBytes, 1)],
    'more memory than there is': [
      'relay',
      Buffer.concat([Buffer.of(frame.free), word(8), word(2 ** 31), word(0)]),
    ],
  };
  for (const [what, [side, wire]] of Object.entries(wrong))
    assert.throws(() => readAll(side, [wire]), /The other end of a relay's session/, what);
});

test('noise ends with a refusal or with nothing, and never otherwise', () => {
  for (let turn = 0; turn < 2000; turn++) {
    const noise = randomBytes(1 + (turn % 40));
    noise[0] = [1, 2, 3, 4, 5, 64, 65, 66, 67, 68, 69, 70, noise[0]!][turn % 13]!;
    for (const side of ['client', 'relay'] as const)
      try {
        readAll(side, [noise]);
      } catch (error) {
        assert.match(String(error), /The other end of a relay's session/, noise.toString('hex'));
      }
  }
});

test('FORMAT.md has every frame with its number', () => {
  const page = readFileSync(path.join(import.meta.dirname, 'FORMAT.md'), 'utf8');
  const rows = [...page.matchAll(/^\| (\d+) \| ([A-Z]+) \|/gm)].map(([, type, name]) => [
    name!.toLowerCase(),
    Number(type),
  ]);
  assert.deepEqual(Object.fromEntries(rows), frame);
});
