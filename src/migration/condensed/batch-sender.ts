/**
 * The way of pages from the source's agent to the link: gathered into batches, condensed, and sent in order. Batches are
 * buffers that are used again and again; who takes an empty one sends it or gives it back.
 */
import { Condenser, type CondenserOptions } from './condenser.ts';
import { encodeFrame, encodeWord, frame } from './frames.ts';
import { Outbox, type OutboxOptions } from './outbox.ts';
import { PageBatch } from './page-batch.ts';

export class BatchSender {
  readonly outbox: Outbox;
  readonly #spare: PageBatch[] = [];
  /** What `addPage` and `addZero` fill. */
  #batch = new PageBatch();
  #condenser: Condenser | undefined;
  /** By number: what waits until the destination has taken all that was sent before. */
  readonly #marks = new Map<number, () => void>();
  #lastMark = 0;

  constructor(options: Omit<OutboxOptions, 'onSent'>) {
    this.outbox = new Outbox({ ...options, onSent: (pieces) => this.#condenser?.takeBack(pieces) });
  }

  /** When it is known how many pages there are; nothing can be condensed before. */
  begin(options: Omit<CondenserOptions, 'linkSpeed'>): void {
    this.#condenser = new Condenser({ ...options, linkSpeed: () => this.outbox.speed });
  }

  get condenser(): Condenser {
    return this.#condenser!;
  }

  /** The destination has lost these sets. */
  drop(sets: Iterable<number>): void {
    this.#condenser?.drop(sets);
  }

  addPage(page: number, buffer: Buffer, at: number): void {
    this.#batch.addPage(page, buffer, at);
    if (this.#batch.isFull) this.flush();
  }

  addZero(page: number): void {
    this.#batch.addZero(page);
    if (this.#batch.isFull) this.flush();
  }

  /** What was added goes without waiting for more. */
  flush(): void {
    if (this.#batch.isEmpty) return;
    this.dispatch(this.#batch, false);
    this.#batch = this.takeEmpty();
  }

  /** What was added does not wait while the link has nothing else to carry. */
  flushIfIdle(): void {
    if (this.outbox.isIdle) this.flush();
  }

  takeEmpty(): PageBatch {
    return this.#spare.pop() ?? new PageBatch();
  }

  giveBack(batch: PageBatch): void {
    batch.clear();
    this.#spare.push(batch);
  }

  /** `plain`: no reference to what the other end has. An empty one is given back. */
  send(batch: PageBatch, plain: boolean): void {
    if (batch.isEmpty) this.#spare.push(batch);
    else this.dispatch(batch, plain);
  }

  /** Sends it, and gives what it has become. */
  dispatch(batch: PageBatch, plain: boolean): Promise<Uint8Array[]> {
    const condensed = this.condenser.condense(batch, { plain, onTaken: () => this.giveBack(batch) });
    this.outbox.send(condensed);
    this.outbox.onRoom(() => this.flushIfIdle());
    return condensed;
  }

  /** Until the destination's QEMU has got all that was added and sent so far. */
  async untilTaken(): Promise<void> {
    this.flush();
    this.#lastMark += 1;
    const { promise, resolve } = Promise.withResolvers<void>();
    this.#marks.set(this.#lastMark, resolve);
    this.outbox.send(encodeFrame(frame.mark, encodeWord(this.#lastMark)));
    await Promise.race([promise, this.outbox.failed]);
  }

  /** The destination says that it has got all before this mark. */
  noteMarked(number: number): void {
    this.#marks.get(number)?.();
    this.#marks.delete(number);
  }
}
