import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { KiB } from '../model/units.ts';
import { BlockPool, BlockQueue, mostBlockBytes } from './blocks.ts';
import { fuzz } from './fuzz.ts';

const byteAt = (offset: number): number => (offset * 31 + (offset >> 8)) & 0xff;

test('bytes come out of a queue as they went in, and those that were taken out never change', () => {
  const anyStep = fc.oneof(
    fc.record({ do: fc.constant('append' as const), lengthBytes: fc.nat(70_000) }),
    fc.record({ do: fc.constant('drop' as const), share: fc.double({ min: 0, max: 1, noNaN: true }) }),
    fc.constant({ do: 'take' as const }),
  );
  fuzz(
    fc.property(fc.array(anyStep, { maxLength: 60 }), (steps) => {
      const queue = new BlockQueue();
      const taken: { offset: number; bytes: Uint8Array }[] = [];
      let [appended, gone] = [0, 0];
      for (const step of steps) {
        if (step.do === 'append') {
          queue.append(Uint8Array.from({ length: step.lengthBytes }, (_, index) => byteAt(appended + index)));
          appended += step.lengthBytes;
        } else if (step.do === 'take') {
          const bytes = queue.takeFirst();
          if (bytes) taken.push({ offset: gone, bytes });
          gone += bytes?.length ?? 0;
        } else {
          const first = queue.first();
          for (const [index, byte] of (first ?? []).entries()) assert.equal(byte, byteAt(gone + index));
          const dropped = Math.floor(step.share * (first?.length ?? 0));
          if (dropped > 0) queue.drop(dropped);
          gone += dropped;
        }
        assert.equal(queue.lengthBytes, appended - gone);
        assert.equal(queue.first() === undefined, appended === gone);
      }
      for (const { offset, bytes } of taken)
        for (const [index, byte] of bytes.entries()) assert.equal(byte, byteAt(offset + index));
    }),
    100,
  );
});

test('a stream that is read as fast as it comes lives in a few blocks', () => {
  const queue = new BlockQueue();
  const memory = new Set<ArrayBufferLike>();
  for (let round = 0; round < 1000; round += 1) {
    queue.append(new Uint8Array(10 * KiB));
    queue.append(new Uint8Array(6 * KiB));
    for (let first = queue.first(); first; first = queue.first()) {
      memory.add(first.buffer);
      queue.drop(first.length);
    }
  }
  assert.equal(memory.size, 1);
});

test('blocks grow to a frame and are then used again', () => {
  const pool = new BlockPool();
  const sizes = Array.from({ length: 6 }, () => pool.take().length);
  assert.deepEqual(
    sizes,
    [16, 32, 64, 128, 256, 256].map((size) => size * KiB),
  );
  const block = pool.take();
  assert.equal(block.length, mostBlockBytes);
  pool.give(block);
  assert.equal(pool.take(), block);
});
