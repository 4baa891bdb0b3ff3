/**
 * Builds the index of a set: this thread reads, another one hashes, sorts and writes, at a lower priority, since
 * guests run beside it. Memory is bounded by a few pieces here and `IndexWriter` there.
 */
import path from 'node:path';
import { Worker } from 'node:worker_threads';
import { AppError } from '../model/errors.ts';
import { blockBytes, digestBytes } from './blocks.ts';
import { type IndexFacts, type IndexOptions, removeUnfinished } from './index-writer.ts';
import type { BlockSource } from './reference-set.ts';

export interface BuildOptions extends Omit<IndexOptions, 'blockCount'> {
  source: BlockSource;
  signal: AbortSignal;
  /** Called after each piece. */
  onProgress?: (progress: { doneBlocks: number; totalBlocks: number }) => void;
}

export type ToWorker =
  | { kind: 'blocks'; first: number; bytes: Uint8Array }
  | { kind: 'digests'; first: number; digests: Uint8Array }
  | { kind: 'finish' };
export type FromWorker =
  | { kind: 'taken' }
  | { kind: 'finished'; facts: IndexFacts }
  | { kind: 'failed'; code: string | undefined; message: string };

const piecesAhead = 4;
const digestsPerPiece = 8192;

/**
 * Writes the index to `file`, whole or not at all. Throws `cancelled`, `insufficient_space`, and what the source
 * throws.
 */
export async function buildIndex(options: BuildOptions): Promise<IndexFacts> {
  const { source, signal, onProgress } = options;
  const { blockCount } = source;
  return inWorker({ ...options, blockCount }, async (send) => {
    for await (const { first, bytes } of source.pieces(signal)) {
      const own = bytes.byteLength === bytes.buffer.byteLength ? bytes : new Uint8Array(bytes);
      const doneBlocks = first + Math.ceil(bytes.length / blockBytes);
      await send({ kind: 'blocks', first, bytes: own }, own.buffer as ArrayBuffer);
      onProgress?.({ doneBlocks, totalBlocks: blockCount });
    }
  });
}

export interface BuildFromDigestsOptions extends Omit<IndexOptions, 'blockCount'> {
  /** 32 bytes for each block from 0 on; all zeroes where the set does not have the block. */
  digests: Buffer;
  signal: AbortSignal;
}

/**
 * The same where the digests are known, as those of a VM's pages are after a migration. Two cloudlets that give the
 * same digests get the same file, and with a prefix for a name the same name.
 */
export function buildIndexFromDigests(options: BuildFromDigestsOptions): Promise<IndexFacts> {
  const { digests } = options;
  const blockCount = digests.length / digestBytes;
  return inWorker({ ...options, blockCount }, async (send) => {
    for (let first = 0; first < blockCount; first += digestsPerPiece) {
      const end = Math.min(blockCount, first + digestsPerPiece);
      const piece = new Uint8Array(digests.subarray(first * digestBytes, end * digestBytes));
      await send({ kind: 'digests', first, digests: piece }, piece.buffer);
    }
  });
}

type Send = (message: ToWorker, give: ArrayBuffer) => Promise<void>;

/** Runs `feed`, which sends the content, with a thread that writes the index. */
async function inWorker(
  options: IndexOptions & { signal: AbortSignal },
  feed: (send: Send) => Promise<void>,
): Promise<IndexFacts> {
  const { signal, file, name, stamp, blockCount } = options;
  throwIfAborted(signal);
  const workerData: IndexOptions = { file, name, stamp, blockCount };
  const extension = path.extname(import.meta.filename);
  await using undo = new AsyncDisposableStack();
  // After the thread has ended, which may be in the middle of its work.
  undo.defer(() => removeUnfinished(file));
  const worker = undo.use(new Worker(new URL(`./index-worker${extension}`, import.meta.url), { workerData }));
  const answers = new Answers(worker, file);
  await feed(async (message, give) => {
    throwIfAborted(signal);
    answers.expect();
    worker.postMessage(message, [give]);
    await answers.atMost(piecesAhead);
  });
  throwIfAborted(signal);
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
