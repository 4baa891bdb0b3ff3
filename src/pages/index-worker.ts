/** The thread that `buildIndex` gives the content to. */
import { setPriority } from 'node:os';
import { parentPort, workerData } from 'node:worker_threads';
import type { FromWorker, ToWorker } from './build-index.ts';
import { IndexWriter } from './index-writer.ts';

const background = 10;

const port = parentPort!;
const answer = (message: FromWorker): void => port.postMessage(message);

// On Linux 0 means this thread, not the process: setpriority(2), NOTES.
setPriority(0, background);
const writer = new IndexWriter(workerData);
port.on('message', (message: ToWorker) => {
  try {
    if (message.kind === 'finish') {
      const facts = writer.finish();
      writer[Symbol.dispose]();
      answer({ kind: 'finished', facts });
    } else {
      const { bytes, first } = message;
      writer.add(first, Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength));
      answer({ kind: 'taken' });
    }
  } catch (error) {
    const { code, message: text } = error as NodeJS.ErrnoException;
    answer({ kind: 'failed', code, message: text });
  }
});
