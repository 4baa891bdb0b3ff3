/** Writes to the memory of a QEMU on a thread of its own: the first touch of a huge page takes longer than making it. */
import path from 'node:path';
import { Worker } from 'node:worker_threads';
import { AppError } from '../../model/errors.ts';

/** `bytes` of the buffer from `at` on, to `position` of the file; zeroes instead where `at` is -1. */
export interface Span {
  position: number;
  at: number;
  bytes: number;
}

export interface RamWriterData {
  fd: number;
  from: SharedArrayBuffer;
}

/** Three numbers for each span. */
export type ToRamWriter = Float64Array<ArrayBuffer>;
/** Bytes of the last message that could be written. */
export type FromRamWriter = number;

/** It needs next to none of its own. */
const resourceLimits = { maxOldGenerationSizeMb: 16, maxYoungGenerationSizeMb: 2 };

export class RamWriter implements AsyncDisposable {
  readonly #worker: Worker;
  readonly #waiting: { bytes: number; settle: PromiseWithResolvers<void> }[] = [];
  #failure: Error | undefined;

  /** The file must stay open for as long as this is there. Throws `unsupported` when no thread can be had. */
  constructor(workerData: RamWriterData) {
    this.#worker = startThread(workerData);
    this.#worker.on('error', (error) => this.#fail(error.message));
    this.#worker.on('exit', () => this.#fail('its thread has ended'));
    this.#worker.on('message', (written: FromRamWriter) => {
      const { bytes, settle } = this.#waiting.shift() ?? {};
      if (written === bytes) settle?.resolve();
      else settle?.reject(unwritable(`${written} bytes of ${bytes} could be written`));
    });
  }

  /** One after the other. Resolves when they are written: until then their content must not change. */
  write(spans: readonly Span[]): Promise<void> {
    if (this.#failure) return Promise.reject(this.#failure);
    const settle = Promise.withResolvers<void>();
    const bytes = spans.reduce((sum, span) => sum + span.bytes, 0);
    this.#waiting.push({ bytes, settle });
    const message: ToRamWriter = Float64Array.from(
      spans.flatMap(({ position, at, bytes }) => [position, at, bytes]),
    );
    this.#worker.postMessage(message, [message.buffer]);
    return settle.promise;
  }

  #fail(why: string): void {
    this.#failure ??= unwritable(why);
    for (const { settle } of this.#waiting.splice(0)) settle.reject(this.#failure);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#worker.terminate();
  }
}

function startThread(workerData: RamWriterData): Worker {
  const extension = path.extname(import.meta.filename);
  const file = new URL(`./ram-writer-thread${extension}`, import.meta.url);
  try {
    return new Worker(file, { workerData, resourceLimits });
  } catch (error) {
    throw unwritable((error as Error).message);
  }
}

const unwritable = (why: string): AppError =>
  new AppError('unsupported', `Write the memory of the VM: ${why}`, { missing: 'guest-memory' });
