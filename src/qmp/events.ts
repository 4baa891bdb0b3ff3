/**
 * Events of one connection as an async iterable. Between reads they wait in a bounded queue: a reader that falls
 * too far behind gets an error instead of a gap that it would not notice.
 */
import { AppError } from '../model/errors.ts';
import type { QmpEvent } from './commands.ts';

export class EventQueue implements AsyncIterableIterator<QmpEvent, undefined, undefined> {
  readonly #limit: number;
  readonly #onReturn: () => void;
  #waiting: QmpEvent[] = [];
  #reader: PromiseWithResolvers<IteratorResult<QmpEvent, undefined>> | undefined;
  #ended: { error?: Error } | undefined;

  /** `onReturn` runs when the reader leaves its loop. */
  constructor(limit: number, onReturn: () => void) {
    this.#limit = limit;
    this.#onReturn = onReturn;
  }

  push(event: QmpEvent): void {
    if (this.#ended) return;
    if (this.#reader) {
      this.#reader.resolve({ value: event, done: false });
      this.#reader = undefined;
    } else if (this.#waiting.length < this.#limit) {
      this.#waiting.push(event);
    } else {
      this.#waiting = [];
      this.end(new AppError('too_many', `A reader of QMP events fell ${this.#limit} events behind`));
    }
  }

  /** What waits is still read; then the reader's loop ends, with the error if there is one. */
  end(error?: Error): void {
    if (this.#ended) return;
    this.#ended = { error };
    if (!this.#reader) return;
    if (error) this.#reader.reject(error);
    else this.#reader.resolve({ value: undefined, done: true });
    this.#reader = undefined;
  }

  async next(): Promise<IteratorResult<QmpEvent, undefined>> {
    const event = this.#waiting.shift();
    if (event) return { value: event, done: false };
    if (this.#ended?.error) throw this.#ended.error;
    if (this.#ended) return { value: undefined, done: true };
    if (this.#reader) throw new Error('Bug: two readers wait on one queue of QMP events');
    this.#reader = Promise.withResolvers();
    return this.#reader.promise;
  }

  async return(): Promise<IteratorResult<QmpEvent, undefined>> {
    this.#waiting = [];
    this.end();
    this.#onReturn();
    return { value: undefined, done: true };
  }

  [Symbol.asyncIterator](): this {
    return this;
  }
}
