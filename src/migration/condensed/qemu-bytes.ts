/**
 * The bytes that QEMU writes, in buffers that are used again: at hundreds of megabytes a second, collecting one for each
 * read costs more CPU than reading.
 */
import { Socket } from 'node:net';
import type { Readable } from 'node:stream';
import { readInto } from '../../link/index.ts';
import { KiB } from '../../model/units.ts';

const bufferBytes = 128 * KiB;

/** Each piece is valid until the next one is asked for; no more is read meanwhile. Throws what breaks the stream. */
export async function* bytesFrom(qemu: Readable): AsyncGenerator<Uint8Array, void, undefined> {
  if (!(qemu instanceof Socket)) {
    yield* qemu;
    return;
  }
  const free: Uint8Array[] = [];
  const read: Uint8Array[] = [];
  let filling: Uint8Array = Buffer.alloc(0);
  let isOver = false;
  let broken: Error | undefined;
  let wake = Promise.withResolvers<void>();
  qemu.once('end', () => {
    isOver = true;
    wake.resolve();
  });
  qemu.once('error', (error) => {
    broken ??= error;
    wake.resolve();
  });
  qemu.once('close', () => {
    if (!isOver) broken ??= new Error('QEMU closed its stream');
    wake.resolve();
  });
  if (qemu.destroyed) throw new Error('QEMU closed its stream');
  readInto(
    qemu,
    () => {
      filling = free.pop() ?? Buffer.allocUnsafeSlow(bufferBytes);
      return filling;
    },
    (bytes) => {
      read.push(bytes);
      wake.resolve();
      return false;
    },
  );
  for (;;) {
    const bytes = read.shift();
    if (bytes) {
      yield bytes;
      free.push(new Uint8Array(bytes.buffer));
      if (read.length === 0) qemu.resume();
    } else if (broken) throw broken;
    else if (isOver) return;
    else {
      await wake.promise;
      wake = Promise.withResolvers();
    }
  }
}
