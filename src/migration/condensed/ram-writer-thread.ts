/** The thread of `RamWriter`. */
import { writeSync } from 'node:fs';
import { parentPort, workerData } from 'node:worker_threads';
import { MiB } from '../../model/units.ts';
import type { FromRamWriter, RamWriterData, ToRamWriter } from './ram-writer.ts';

const { fd, from }: RamWriterData = workerData;
const content = new Uint8Array(from);
const zeroes = new Uint8Array(MiB / 4);

/** Gives how many bytes could be written. */
function writeWhole(position: number, at: number, bytes: number): number {
  let done = 0;
  try {
    for (let wrote = 1; done < bytes && wrote > 0; done += wrote)
      wrote =
        at < 0
          ? writeSync(fd, zeroes, 0, Math.min(zeroes.length, bytes - done), position + done)
          : writeSync(fd, content, at + done, bytes - done, position + done);
  } catch {
    // There is nothing at that address, or it is not ours to write.
  }
  return done;
}

parentPort!.on('message', (spans: ToRamWriter) => {
  let written: FromRamWriter = 0;
  for (let index = 0; index < spans.length; index += 3)
    written += writeWhole(spans[index]!, spans[index + 1]!, spans[index + 2]!);
  parentPort!.postMessage(written);
});
