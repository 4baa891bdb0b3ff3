/**
 * What happened on this cloudlet, in order, for everyone who watches.
 *
 * A subscriber has no queue: it keeps the id of the last event it was given and reads on from the store when there is
 * more. So replay and live are the same loop, nothing is given twice, nothing is skipped, and a slow subscriber costs
 * no memory. What a subscriber cannot be given is said by two events that are never stored: `gap` (events between
 * `afterId` and this one's id are gone) and `end` (why the stream stops; it can be resumed after this id).
 */
import { AppError } from '../model/errors.ts';
import type { EventRecord } from '../model/operation.ts';
import type { NewEvent, Store } from './store/index.ts';

export interface EventLogOptions {
  /** Streams at one time. */
  maxSubscribers?: number;
  /** Events by which a subscriber that was up to date may fall behind before it is ended. */
  maxLag?: number;
  now?: () => number;
}

export interface Subscription {
  /** The last event that the subscriber has seen, 0 for all that are kept; absent for new ones only. */
  afterId?: number | undefined;
  signal?: AbortSignal | undefined;
}

const BATCH = 128;

export class EventLog implements Disposable {
  readonly #store: Store;
  readonly #maxSubscribers: number;
  readonly #maxLag: number;
  readonly #now: () => number;
  /** Subscribers that are open, each with what wakes it up. */
  readonly #wakers = new Set<{ wake: () => void }>();
  #lastId: number;
  #closed = false;

  constructor(store: Store, { maxSubscribers = 256, maxLag = 1000, now = Date.now }: EventLogOptions = {}) {
    this.#store = store;
    this.#maxSubscribers = maxSubscribers;
    this.#maxLag = maxLag;
    this.#now = now;
    this.#lastId = store.events.lastId();
  }

  get subscriberCount(): number {
    return this.#wakers.size;
  }

  /** Stores an event; subscribers see it once it is committed, together with the transaction around the call. */
  append(event: NewEvent): EventRecord {
    const at = new Date(this.#now()).toISOString();
    return this.#store.transact(() => {
      const record = this.#store.events.append(event, at);
      this.#store.afterCommit(() => {
        this.#lastId = record.id;
        for (const subscriber of this.#wakers) subscriber.wake();
      });
      return record;
    });
  }

  /**
   * Events after `afterId`: first those that are stored, then each new one. Ends without a word when `signal` aborts
   * or the consumer leaves, and with an `end` event whose `data.reason` is `too_slow` or `closing` otherwise.
   * A stream counts from the first time that it is read. Errors: `too_many` if too many streams are open.
   */
  subscribe({ afterId, signal }: Subscription = {}): AsyncGenerator<EventRecord, void, void> {
    if (this.#wakers.size >= this.#maxSubscribers) {
      throw new AppError('too_many', `Cannot open an event stream: ${this.#maxSubscribers} are open.`, {
        limit: this.#maxSubscribers,
      });
    }
    return this.#read(afterId ?? this.#lastId, signal);
  }

  /** Ends every stream. */
  close(): void {
    this.#closed = true;
    for (const subscriber of this.#wakers) subscriber.wake();
  }

  [Symbol.dispose](): void {
    this.close();
  }

  async *#read(afterId: number, signal: AbortSignal | undefined): AsyncGenerator<EventRecord, void, void> {
    let woken = Promise.withResolvers<void>();
    const subscriber = { wake: () => woken.resolve() };
    this.#wakers.add(subscriber);
    signal?.addEventListener('abort', subscriber.wake);
    try {
      let seen = afterId;
      let wasUpToDate = false;
      while (!signal?.aborted) {
        if (this.#closed) return yield this.#notStored(seen, 'end', { reason: 'closing' });
        if (wasUpToDate && this.#lastId - seen > this.#maxLag) {
          return yield this.#notStored(seen, 'end', { reason: 'too_slow' });
        }
        const kept = this.#keptAfter(seen);
        if (kept !== seen) {
          yield this.#notStored(kept, 'gap', { afterId: seen });
          seen = kept;
          continue;
        }
        const batch = this.#store.events.since(seen, BATCH);
        for (const event of batch) {
          if (signal?.aborted) return;
          yield event;
          seen = event.id;
        }
        if (batch.length === BATCH) continue;
        wasUpToDate = true;
        // Nothing is awaited between the read and this check, so no event falls between them.
        if (batch.length === 0) await woken.promise;
        woken = Promise.withResolvers<void>();
      }
    } finally {
      signal?.removeEventListener('abort', subscriber.wake);
      this.#wakers.delete(subscriber);
    }
  }

  /** The id from which on all events that were not replaced are stored: `afterId` itself if nothing is missing. */
  #keptAfter(afterId: number): number {
    const pruned = this.#store.events.prunedThrough();
    // Beyond the last one: the id is of another log, from before this cloudlet's state was made anew.
    return afterId < pruned || afterId > this.#lastId ? pruned : afterId;
  }

  #notStored(id: number, kind: 'gap' | 'end', data: Record<string, unknown>): EventRecord {
    return { id, at: new Date(this.#now()).toISOString(), kind, data };
  }
}
