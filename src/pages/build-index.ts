/**
 * Builds the index of a set: this thread reads, another one hashes, sorts and writes, at a lower priority, since
 * guests run beside it. Memory is bounded by a few pieces here and `IndexWriter` there.
 */
import path from 'node:path';
import { Worker } from 'node:worker_threads';
import { AppError } from '../model/errors.ts';
import { type IndexFacts, type IndexOptions, removeUnfinished } from './index-writer.ts';
import type { BlockSource } from './reference-set.ts';

export interface BuildOptions extends Omit<IndexOptions, 'blockCount'> {
  source: BlockSource;
  signal: AbortSignal;
  /** Called after each piece. */
  onProgress?: (progress: { doneBlocks: number; totalBlocks: number }) => void;
}

export type ToWorker = { kind: 'blocks'; first: number; bytes: Uint8Array } | { kind: 'finish' };
export type FromWorker =
  | { kind: 'taken' }
  | { kind: 'finished'; facts: IndexFacts }
  | { kind: 'failed'; code: string | undefined; message: string };

const piecesAhead = 4;

/**
 * Writes the index to `file`, whole or not at all. Throws `cancelled`, `insufficient_space`, and what the source
 * throws.
 */
export async function buildIndex(options: BuildOptions): Promise<IndexFacts> {
  const { source, signal, onProgress, file, name, stamp } = options;
  throwIfAborted(signal);
  const { blockCount } = source;
  const workerData: IndexOptions = { file, name, stamp, blockCount };
  const extension = path.extname(import.meta.filename);
  await using undo = new AsyncDisposableStack();
  // After the thread has ended, which may be in the middle of its work.
  undo.defer(() => removeUnfinished(file));
  const worker = undo.use(new Worker(new URL(`./index-worker${extension}`, import.meta.url), { workerData }));
  const answers = new Answers(worker, file);
  for await (const { first, bytes } of source.pieces(signal)) {
    throwIfAborted(signal);
    answers.expect();
    const own = bytes.byteLength === bytes.buffer.byteLength ? bytes : new Uint8Array(bytes);
    const doneBlocks = first + Math.ceil(bytes.length / 4096);
    const message: ToWorker = { kind: 'blocks', first, bytes: own };
    worker.postMessage(message, [own.buffer as ArrayBuffer]);
    await answers.atMost(piecesAhead);
    onProgress?.({ doneBlocks, totalBlocks: blockCount });
  }
  worker.postMessage({ kind: 'finish' } satisfies ToWorker);
  return await answers.finished;
}

/** How much the worker has still to take, and how it ends. */
class Answers {
  readonly finished: Promise<IndexFacts>;
  #waiting = 0;
  #wake: (() => void) | undefined;
  #failure: Error | undefined;

  constructor(worker: Worker, file: string) {
    const { promise, resolve, reject } = Promise.withResolvers<IndexFacts>();
    this.finished = promise;
    promise.catch(() => {});
    const fail = (error: Error) => {
      this.#failure ??= error;
      reject(error);
      this.#wake?.();
    };
    worker.on('error', fail);
    worker.on('exit', () => fail(new Error('the thread that builds the index has ended')));
    worker.on('message', (answer: FromWorker) => {
      if (answer.kind === 'failed') return fail(explain(answer, file));
      if (answer.kind === 'finished') return resolve(answer.facts);
      this.#waiting -= 1;
      this.#wake?.();
    });
  }

  expect(): void {
    this.#waiting += 1;
  }

  async atMost(waiting: number): Promise<void> {
    while (this.#waiting > waiting && !this.#failure) {
      const { promise, resolve } = Promise.withResolvers<void>();
      this.#wake = resolve;
      await promise;
    }
    if (this.#failure) throw this.#failure;
  }
}

function explain({ code, message }: { code: string | undefined; message: string }, file: string): Error {
  if (code === 'ENOSPC')
    return new AppError('insufficient_space', `Build index ${file}: no room on the disk`, { file });
  return new Error(`Build index ${file}: ${message}`);
}

function throwIfAborted(signal: AbortSignal): void {
  if (!signal.aborted) return;
  if (signal.reason instanceof AppError) throw signal.reason;
  throw new AppError('cancelled', 'Build index: cancelled', {}, { cause: signal.reason });
}
