/**
 * Long work in the background, journalled: the record is on the disk before the work starts and after it has ended.
 *
 * Invariants: an operation ends exactly once; a daemon that dies leaves none running, because the next one calls
 * them `interrupted`; between start and end only progress changes, and within a phase it never falls.
 */
import { AppError, asAppError } from '../model/errors.ts';
import { newId, type Uuid } from '../model/ids.ts';
import type { Operation, OperationKind, OperationSubject, Progress } from '../model/operation.ts';
import type { EventLog } from './events.ts';
import type { Page, PageRequest, Store } from './store/index.ts';

export interface OperationsOptions {
  store: Store;
  events: EventLog;
  /** Is told of each failure that is a bug, with its stack. */
  onBug: (error: AppError, operation: Operation) => void;
  /** Operations at one time. */
  maxRunning?: number;
  /** Least time between two writes of one operation's progress. */
  progressIntervalMs?: number;
  /** Operations kept in the journal. */
  keep?: number;
  now?: () => number;
}

export interface OperationContext {
  /** Aborts when the operation is cancelled or the daemon stops; its reason is the error to end with. */
  signal: AbortSignal;
  progress(report: Progress): void;
  /** Adds to the subject what the work has made, such as the digest of the image. */
  describe(subject: OperationSubject): void;
}

export type OperationWork = (context: OperationContext) => Promise<Record<string, string> | undefined>;

interface Running {
  operation: Operation;
  abort: AbortController;
  ended: Promise<Operation>;
  /** Pending write of progress. */
  timer?: NodeJS.Timeout | undefined;
  lastWriteMs: number;
}

export class Operations implements AsyncDisposable {
  readonly #options: Required<OperationsOptions>;
  readonly #running = new Map<Uuid, Running>();
  #endsSincePrune = 0;
  #closed = false;

  /** Ends what an earlier daemon left running as `interrupted`. */
  constructor(options: OperationsOptions) {
    this.#options = { maxRunning: 64, progressIntervalMs: 200, keep: 10_000, now: Date.now, ...options };
    const { store } = this.#options;
    store.transact(() => {
      for (const operation of store.operations.interruptRunning(this.#time()))
        this.#tell('finished', operation);
      store.operations.prune(this.#options.keep);
    });
  }

  get runningCount(): number {
    return this.#running.size;
  }

  /**
   * Starts work and gives its record at once. The work's result or error goes into the record; an error that is not
   * an AppError is `internal`. Work that throws after its signal aborted was `cancelled` (or `interrupted`, if the
   * daemon stops); work that comes to its end all the same has succeeded.
   * Errors: `too_many` if as many run as may.
   */
  run(kind: OperationKind, subject: OperationSubject, work: OperationWork): Operation {
    this.#refuseIfFull();
    const { store } = this.#options;
    const operation: Operation = {
      id: newId(),
      kind,
      subject,
      state: 'running',
      progress: null,
      createdAt: this.#time(),
    };
    store.transact(() => {
      store.operations.insert(operation);
      this.#tell('started', operation);
    });
    const running: Running = {
      operation,
      abort: new AbortController(),
      ended: Promise.resolve(operation),
      lastWriteMs: Number.NEGATIVE_INFINITY,
    };
    this.#running.set(operation.id, running);
    running.ended = this.#perform(running, work);
    return operation;
  }

  /** The record with the newest progress. */
  get(id: Uuid): Operation | undefined {
    return this.#running.get(id)?.operation ?? this.#options.store.operations.get(id);
  }

  /** Oldest first. */
  list(request: PageRequest): Page<Operation> {
    const page = this.#options.store.operations.list(request);
    return { ...page, items: page.items.map((item) => this.#running.get(item.id)?.operation ?? item) };
  }

  /** The operations that run now. */
  running(): Operation[] {
    return Array.from(this.#running.values(), ({ operation }) => operation);
  }

  /**
   * Asks an operation to stop, and gives its record; it runs on until its work has undone what it made.
   * Errors: `not_found`, `wrong_state` if it has ended.
   */
  cancel(id: Uuid): Operation {
    const running = this.#running.get(id);
    if (running) {
      running.abort.abort(new AppError('cancelled', 'The operation was cancelled.'));
      return running.operation;
    }
    const { state } = this.#require(id);
    throw new AppError('wrong_state', `Cannot cancel operation ${id}: it has ${state}.`, {
      state,
      allowed: [],
    });
  }

  /** The record once the operation has ended, or as it is when `signal` aborts. Errors: `not_found`. */
  async wait(id: Uuid, { signal }: { signal?: AbortSignal } = {}): Promise<Operation> {
    const running = this.#running.get(id);
    if (!running || signal?.aborted) return this.#require(id);
    const aborted = Promise.withResolvers<void>();
    const onAbort = () => aborted.resolve();
    signal?.addEventListener('abort', onAbort);
    try {
      await Promise.race([running.ended, aborted.promise]);
    } finally {
      signal?.removeEventListener('abort', onAbort);
    }
    return this.#require(id);
  }

  /** Takes no more operations, aborts those that run and waits for their end. */
  async close(): Promise<void> {
    this.#closed = true;
    const all = Array.from(this.#running.values());
    for (const { abort } of all) abort.abort(new AppError('interrupted', 'The daemon stops.'));
    await Promise.all(all.map(({ ended }) => ended));
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  async #perform(running: Running, work: OperationWork): Promise<Operation> {
    const { signal } = running.abort;
    const context: OperationContext = {
      signal,
      progress: (report) => this.#report(running, report),
      describe: (subject) => {
        running.operation = { ...running.operation, subject: { ...running.operation.subject, ...subject } };
        this.#options.store.operations.update(running.operation);
      },
    };
    // The caller has the record before the work begins, so that even a quick end comes after it.
    await Promise.resolve();
    let end: Pick<Operation, 'state' | 'result' | 'error'>;
    try {
      signal.throwIfAborted();
      const result = await work(context);
      end = { state: 'succeeded', ...(result && { result }) };
    } catch (error) {
      end = this.#failure(running, error);
    }
    return this.#finish(running, end);
  }

  #failure(running: Running, thrown: unknown): Pick<Operation, 'state' | 'error'> {
    const { signal } = running.abort;
    const error = signal.aborted ? (signal.reason as AppError) : asAppError(thrown);
    // A stop that was asked for hides the error that it caused, but not a bug in undoing the work.
    const bug = asAppError(thrown);
    if (bug.code === 'internal' && !(signal.aborted && isAbort(thrown)))
      this.#options.onBug(bug, running.operation);
    const { code, message, details } = error;
    return { state: code === 'cancelled' ? 'cancelled' : 'failed', error: { code, message, details } };
  }

  #finish(running: Running, end: Pick<Operation, 'state' | 'result' | 'error'>): Operation {
    const { store, keep } = this.#options;
    clearTimeout(running.timer);
    const operation: Operation = { ...running.operation, ...end, finishedAt: this.#time() };
    running.operation = operation;
    this.#running.delete(operation.id);
    this.#endsSincePrune += 1;
    this.#tryToWrite(operation, () =>
      store.transact(() => {
        store.operations.update(operation);
        this.#tell('finished', operation);
        if (this.#endsSincePrune < PRUNE_STEP) return;
        store.operations.prune(keep);
        this.#endsSincePrune = 0;
      }),
    );
    return operation;
  }

  #report(running: Running, report: Progress): void {
    if (!this.#running.has(running.operation.id)) return;
    const before = running.operation.progress;
    const done = before?.phase === report.phase ? Math.max(before.done, report.done) : report.done;
    running.operation = { ...running.operation, progress: { ...report, done } };
    if (running.timer) return;
    const { progressIntervalMs, now } = this.#options;
    const dueInMs = running.lastWriteMs + progressIntervalMs - now();
    if (dueInMs <= 0) this.#writeProgress(running);
    else {
      running.timer = setTimeout(() => {
        running.timer = undefined;
        this.#writeProgress(running);
      }, dueInMs);
    }
  }

  #writeProgress(running: Running): void {
    const { store, now } = this.#options;
    const { operation } = running;
    running.lastWriteMs = now();
    this.#tryToWrite(operation, () =>
      store.relaxed(() =>
        store.transact(() => {
          store.operations.update(operation);
          this.#tell('progress', operation);
        }),
      ),
    );
  }

  /**
   * A journal that cannot be written (a full disk) must not end the daemon, which holds running VMs. An end that is
   * lost this way is called `interrupted` by the next daemon.
   */
  #tryToWrite(operation: Operation, write: () => void): void {
    try {
      write();
    } catch (error) {
      this.#options.onBug(asAppError(error), operation);
    }
  }

  #tell(what: 'started' | 'progress' | 'finished', operation: Operation): void {
    const { vmId } = operation.subject;
    this.#options.events.append({
      kind: `operation.${what}`,
      ...(vmId === undefined ? {} : { vmId }),
      data: { operation },
      // Of all that an operation reports, the last word is kept: it says everything that was said before.
      ...(what === 'started' ? {} : { latestOf: `operation:${operation.id}` }),
    });
  }

  #refuseIfFull(): void {
    const { maxRunning } = this.#options;
    if (this.#closed) throw new AppError('interrupted', 'Cannot start an operation: the daemon stops.');
    if (this.#running.size < maxRunning) return;
    throw new AppError('too_many', `Cannot start an operation: ${maxRunning} are running.`, {
      limit: maxRunning,
    });
  }

  #require(id: Uuid): Operation {
    const operation = this.get(id);
    if (operation) return operation;
    throw new AppError('not_found', `There is no operation ${id}.`, { kind: 'operation', name: id });
  }

  #time(): string {
    return new Date(this.#options.now()).toISOString();
  }
}

/** Ends between two looks for operations beyond the bound, which walk the index. */
const PRUNE_STEP = 100;

const isAbort = (error: unknown): boolean => error instanceof Error && error.name === 'AbortError';
