/** The thread that `buildIndex` gives the content to. */
import { setPriority } from 'node:os';
import { parentPort, workerData } from 'node:worker_threads';
import { digestBytes } from './blocks.ts';
import type { FromWorker, ToWorker } from './build-index.ts';
import { IndexWriter } from './index-writer.ts';

const background = 10;

const port = parentPort!;
const answer = (message: FromWorker): void => port.postMessage(message);

// On Linux 0 means this thread, not the process: setpriority(2), NOTES.
setPriority(0, background);
const writer = new IndexWriter(workerData);

function addDigests(first: number, digests: Uint8Array): void {
  for (let i = 0; i < digests.length / digestBytes; i += 1) {
    const digest = digests.subarray(i * digestBytes, (i + 1) * digestBytes);
    if (digest.some((byte) => byte !== 0)) writer.addDigest(first + i, digest);
  }
}

const asBuffer = (bytes: Uint8Array): Buffer => Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);

port.on('message', (message: ToWorker) => {
  try {
    if (message.kind === 'finish') {
      const facts = writer.finish();
      writer[Symbol.dispose]();
      answer({ kind: 'finished', facts });
    } else {
      if (message.kind === 'blocks') writer.add(message.first, asBuffer(message.bytes));
      else addDigests(message.first, message.digests);
      answer({ kind: 'taken' });
    }
  } catch (error) {
    const { code, message: text } = error as NodeJS.ErrnoException;
    answer({ kind: 'failed', code, message: text });
  }
});
