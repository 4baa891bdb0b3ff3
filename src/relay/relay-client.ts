/** The client's end of a session with a relay: puts slabs, gets them back, and knows how fast that goes. */
import type { Duplex } from 'node:stream';
import { AppError, asAppError } from '../model/errors.ts';
import type { Uuid } from '../model/ids.ts';
import { type ClientFrame, encodeFrame, FrameReader, relayError } from './frames.ts';
import { Rate } from './rate.ts';

const closeTimeoutMs = 5000;

type Answered = 'held' | 'full' | boolean | Buffer | undefined;

export class RelayClient {
  readonly #session: Duplex;
  readonly #puts = new Map<number, Waiting>();
  readonly #gets = new Map<number, Waiting>();
  readonly #expected = new Map<number, Waiting>();
  readonly #passing = new Map<string, Waiting>();
  readonly #keeps = new Map<string, Waiting>();
  readonly #gone = Promise.withResolvers<AppError>();
  readonly #greeted = Promise.withResolvers<void>();
  #canShare: boolean | undefined;
  #error: AppError | undefined;
  #nextTag = 1;
  #freeBytes = 0;
  #inFlightBytes = 0;
  #expectedBytes = 0;
  #passingBytes = 0;
  readonly #rate = new Rate();
  readonly #passingRate = new Rate();
  #sentBytes = 0;

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

  /** Whether it knows SHARE; `undefined` before its first word. */
  get canShare(): boolean | undefined {
    return this.#canShare;
  }

  /** Bytes of slabs that have no answer yet. */
  get inFlightBytes(): number {
    return this.#inFlightBytes;
  }

  /** Bytes of slabs that are to come there by way of other relays, and have not. */
  get expectedBytes(): number {
    return this.#expectedBytes;
  }

  /** Bytes of slabs that it is to give on to other relays, and has not. */
  get passingBytes(): number {
    return this.#passingBytes;
  }

  /** The shortest way there and back that was seen; `undefined` where nobody measures it. */
  get leastRttMs(): number | undefined {
    const { stats } = this.#session as { stats?: { leastRttMs: number | null } };
    return stats?.leastRttMs ?? undefined;
  }

  /** How fast slabs were taken lately; `undefined` before the first. */
  get bytesPerSecond(): number | undefined {
    return this.#rate.bytesPerSecond;
  }

  /** How fast slabs were given on lately. */
  get passedPerSecond(): number | undefined {
    return this.#passingRate.bytesPerSecond;
  }

  /** Of slabs that were sent to it from here, and answered. */
  get sentBytes(): number {
    return this.#sentBytes;
  }

  /** Whether the relay holds it now. Rejects when the session ends before it has said so. */
  async put(slab: number, bytes: Buffer): Promise<boolean> {
    if (this.#inFlightBytes === 0) this.#rate.begin();
    this.#inFlightBytes += bytes.length;
    try {
      const answer = await this.#ask(this.#puts, slab, { name: 'put', slab, bytes });
      this.#sentBytes += bytes.length;
      return answer === 'held';
    } finally {
      this.#inFlightBytes -= bytes.length;
      this.#rate.note(bytes.length);
    }
  }

  /** What another group has there under this number is this one's, too: whether it is. */
  async share(slab: number, group: string): Promise<boolean> {
    await this.#greeted.promise;
    // An older one would end the session for it.
    if (this.#canShare === false) return false;
    return (await this.#ask(this.#puts, slab, { name: 'share', slab, group })) === 'held';
  }

  /**
   * Resolves when a slab has come there by whatever session: whether it is the one with this SHA-256. Rejects when the
   * session ends before.
   */
  async expect(slab: number, digest: Buffer, lengthBytes: number): Promise<boolean> {
    this.#expectedBytes += lengthBytes;
    try {
      return (await this.#ask(this.#expected, slab, { name: 'expect', slab, digest })) as boolean;
    } finally {
      this.#expectedBytes -= lengthBytes;
    }
  }

  /** The relay gives a slab, which was put before, to that one: whether that has taken it. */
  async pass(slab: number, to: Uuid, lengthBytes: number): Promise<boolean> {
    if (this.#passingBytes === 0) this.#passingRate.begin();
    this.#passingBytes += lengthBytes;
    try {
      const isTaken = await this.#ask(this.#passing, `${slab} ${to}`, { name: 'pass', slab, to });
      if (isTaken) this.#passingRate.note(lengthBytes);
      return isTaken as boolean;
    } finally {
      this.#passingBytes -= lengthBytes;
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

  /**
   * The group's slabs are to be kept as long as any are, after the last session. Resolves when the relay knows; rejects when
   * the session ends before.
   */
  async prolong(): Promise<void> {
    await this.#ask(this.#keeps, 'group', { name: 'keep' });
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

  #ask<Key>(waiting: Map<Key, Waiting>, key: Key, request: ClientFrame): Promise<Answered> {
    if (this.#error) return Promise.reject(this.#error);
    if (waiting.has(key)) throw new Error(`Bug: ${request.name} ${key} was asked already`);
    const one = Promise.withResolvers<Answered>();
    waiting.set(key, one);
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
          if (next.name === 'free') this.#greet(next.canShare);
          if (next.name === 'held' || next.name === 'full') this.#answer(this.#puts, next.slab, next.name);
          if (next.name === 'absent') this.#answer(this.#gets, next.tag, undefined);
          if (next.name === 'kept') this.#answer(this.#keeps, 'group', true);
          if (next.name === 'here') this.#answer(this.#expected, next.slab, next.isRight);
          if (next.name === 'passed') this.#answer(this.#passing, `${next.slab} ${next.to}`, next.isTaken);
          if (next.name === 'slab') this.#answer(this.#gets, next.tag, Buffer.from(next.bytes));
        }
      }
      this.#end(new AppError('peer_unreachable', 'The relay ended the session'));
    } catch (error) {
      this.#end(asAppError(error));
      this.#session.destroy();
    }
  }

  #greet(canShare = false): void {
    this.#canShare ??= canShare;
    this.#greeted.resolve();
  }

  #answer<Key>(waiting: Map<Key, Waiting>, key: Key, answer: Answered): void {
    const one = waiting.get(key);
    if (!one) throw relayError(`an answer to ${key}, which was not asked`);
    waiting.delete(key);
    one.resolve(answer);
  }

  #end(error: AppError): void {
    if (this.#error) return;
    this.#error = error;
    this.#greeted.resolve();
    for (const waiting of [this.#puts, this.#gets, this.#expected, this.#passing, this.#keeps]) {
      for (const one of waiting.values()) one.reject(error);
      waiting.clear();
    }
    this.#gone.resolve(error);
  }
}

type Waiting = PromiseWithResolvers<Answered>;
