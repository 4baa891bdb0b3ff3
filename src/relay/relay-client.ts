/** The client's end of a session with a relay: puts slabs, gets them back, and knows how fast that goes. */
import type { Duplex } from 'node:stream';
import { AppError, asAppError } from '../model/errors.ts';
import { type ClientFrame, encodeFrame, FrameReader, maxSlabBytes, relayError } from './frames.ts';

/** How quickly the measured rate follows. */
const smoothing = 0.25;
/** A rate is measured over at least this long. */
const leastMeasureMs = 50;

const closeTimeoutMs = 5000;

type Answered = 'held' | 'full' | Buffer | undefined;

export class RelayClient {
  readonly #session: Duplex;
  readonly #puts = new Map<number, Waiting>();
  readonly #gets = new Map<number, Waiting>();
  readonly #gone = Promise.withResolvers<AppError>();
  #error: AppError | undefined;
  #nextTag = 1;
  #freeBytes = 0;
  #inFlightBytes = 0;
  #measure = { since: performance.now(), bytes: 0 };
  #bytesPerSecond: number | undefined;
  #heldBytes = 0;

  /** The session is the client's from now on. */
  constructor(session: Duplex) {
    this.#session = session;
    session.on('error', (error) => this.#end(asAppError(error)));
    session.on('close', () =>
      this.#end(new AppError('peer_unreachable', 'The session with the relay ended')),
    );
    void this.#read();
  }

  get isAlive(): boolean {
    return this.#error === undefined;
  }

  /** Resolves with the reason when the session is over. */
  get gone(): Promise<AppError> {
    return this.#gone.promise;
  }

  /** What the relay said last that it would take. */
  get freeBytes(): number {
    return this.#freeBytes;
  }

  /** Bytes of slabs that have no answer yet. */
  get inFlightBytes(): number {
    return this.#inFlightBytes;
  }

  /** How fast slabs were taken lately; `undefined` before the first. */
  get bytesPerSecond(): number | undefined {
    return this.#bytesPerSecond;
  }

  /** Of slabs that it said it holds. */
  get heldBytes(): number {
    return this.#heldBytes;
  }

  /** Whether the relay holds it now. Rejects when the session ends before it has said so. */
  async put(slab: number, bytes: Buffer): Promise<boolean> {
    if (this.#inFlightBytes === 0) this.#measure = { since: performance.now(), bytes: 0 };
    this.#inFlightBytes += bytes.length;
    try {
      const answer = await this.#ask(this.#puts, slab, { name: 'put', slab, bytes });
      if (answer !== 'held') return false;
      this.#heldBytes += bytes.length;
      return true;
    } finally {
      this.#inFlightBytes -= bytes.length;
      this.#note(bytes.length);
    }
  }

  /** `undefined` when the relay does not hold it. Rejects when the session ends before it has said so. */
  async get(
    slab: number,
    range: { at: number; length: number; urgent?: boolean },
  ): Promise<Buffer | undefined> {
    const { at, length, urgent = false } = range;
    const tag = this.#nextTag++;
    const answer = await this.#ask(this.#gets, tag, { name: 'get', tag, slab, urgent, at, length });
    return answer as Buffer | undefined;
  }

  /** Everything of this migration may be forgotten. It is no loss if this does not arrive. */
  drop(): void {
    if (this.isAlive) for (const piece of encodeFrame({ name: 'drop' })) this.#session.write(piece);
  }

  /** Nothing more will be asked; what was said before still arrives, if that is soon. */
  close(): void {
    this.#session.end();
    const timer = setTimeout(() => this.#session.destroy(), closeTimeoutMs);
    timer.unref();
    void this.gone.then(() => clearTimeout(timer));
  }

  #ask(waiting: Map<number, Waiting>, number: number, request: ClientFrame): Promise<Answered> {
    if (this.#error) return Promise.reject(this.#error);
    if (waiting.has(number)) throw new Error(`Bug: slab ${number} is being put already`);
    const one = Promise.withResolvers<Answered>();
    waiting.set(number, one);
    for (const piece of encodeFrame(request)) this.#session.write(piece);
    return one.promise;
  }

  async #read(): Promise<void> {
    const reader = new FrameReader('relay');
    try {
      for await (const bytes of this.#session.iterator({ destroyOnReturn: false })) {
        reader.push(bytes);
        for (let next = reader.next(); next; next = reader.next()) {
          if ('freeBytes' in next) this.#freeBytes = next.freeBytes;
          if (next.name === 'held' || next.name === 'full') this.#answer(this.#puts, next.slab, next.name);
          if (next.name === 'absent') this.#answer(this.#gets, next.tag, undefined);
          if (next.name === 'slab') this.#answer(this.#gets, next.tag, Buffer.from(next.bytes));
        }
      }
      this.#end(new AppError('peer_unreachable', 'The relay ended the session'));
    } catch (error) {
      this.#end(asAppError(error));
      this.#session.destroy();
    }
  }

  #answer(waiting: Map<number, Waiting>, number: number, answer: Answered): void {
    const one = waiting.get(number);
    if (!one) throw relayError(`an answer to ${number}, which was not asked`);
    waiting.delete(number);
    one.resolve(answer);
  }

  #note(bytes: number): void {
    const measure = this.#measure;
    measure.bytes += bytes;
    const now = performance.now();
    const tookMs = now - measure.since;
    if (tookMs < leastMeasureMs && measure.bytes < 4 * maxSlabBytes) return;
    const rate = (measure.bytes * 1000) / Math.max(1, tookMs);
    const before = this.#bytesPerSecond;
    this.#bytesPerSecond = before === undefined ? rate : before + smoothing * (rate - before);
    this.#measure = { since: now, bytes: 0 };
  }

  #end(error: AppError): void {
    if (this.#error) return;
    this.#error = error;
    for (const waiting of [this.#puts, this.#gets]) {
      for (const one of waiting.values()) one.reject(error);
      waiting.clear();
    }
    this.#gone.resolve(error);
  }
}

type Waiting = PromiseWithResolvers<Answered>;
