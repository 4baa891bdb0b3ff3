/**
 * The receiving half of a session at work: holds what the reader has not asked for, sizes the window, and decides
 * when an ACK is worth its cost: after half of the window, at the end, or a little later.
 */
import { KiB, MiB } from '../model/units.ts';
import { BlockQueue } from './blocks.ts';
import { encodeFrame } from './frame-encoder.ts';
import { Incoming, type IncomingRefusal } from './incoming.ts';
import type { LinkLimits } from './limits.ts';
import { WindowTuner } from './window.ts';

const mostAckStepBytes = 1 * MiB;
/** Less is not worth a look at the clock. */
const tuneStepBytes = 64 * KiB;

export class Receiver {
  readonly #incoming = new Incoming();
  readonly #window: WindowTuner;
  readonly #ackDelayMs: number;
  /** An ACK has come due later, outside of any call. */
  readonly #onAckDue: () => void;
  readonly #waiting = new BlockQueue();
  #untunedBytes = 0;
  #told = { received: 0, limit: 0 };
  #ackDue = false;
  #timer: NodeJS.Timeout | undefined;

  constructor(limits: LinkLimits, onAckDue: () => void) {
    this.#window = new WindowTuner(limits.initialWindowBytes, limits.maxWindowBytes);
    this.#incoming.grant(this.#window.windowBytes);
    this.#ackDelayMs = limits.ackDelayMs;
    this.#onAckDue = onAckDue;
  }

  get receivedBytes(): number {
    return this.#incoming.receivedBytes;
  }
  /** Bytes that wait for the reader. */
  get waitingBytes(): number {
    return this.#waiting.lengthBytes;
  }
  get windowBytes(): number {
    return this.#window.windowBytes;
  }
  /** END has arrived; bytes may still wait for the reader. */
  get ended(): boolean {
    return this.#incoming.ended;
  }
  /** END has arrived and the reader has everything before it. */
  get drained(): boolean {
    return this.#incoming.ended && this.#waiting.lengthBytes === 0;
  }
  /** What HELLO or WELCOME tells the peer. */
  get position(): { received: number; limit: number } {
    return { received: this.#incoming.acknowledgement, limit: this.#incoming.limit };
  }

  onData(offset: number, bytes: Uint8Array): IncomingRefusal | undefined {
    const fresh = this.#incoming.take(offset, bytes);
    if (typeof fresh === 'string') return fresh;
    this.#waiting.append(fresh);
    return undefined;
  }

  onEnd(offset: number): IncomingRefusal | undefined {
    return this.#incoming.end(offset);
  }

  /** The next bytes for a reader who keeps them, and counts as having taken them. */
  next(rttMs: number | undefined): Uint8Array | undefined {
    const bytes = this.#waiting.takeFirst();
    if (bytes) this.#consume(bytes.length, rttMs);
    return bytes;
  }

  /** The next bytes for a reader who only looks, and says by `drop` that it has taken them. */
  first(): Uint8Array | undefined {
    return this.#waiting.first();
  }

  drop(lengthBytes: number, rttMs: number | undefined): void {
    // The session has failed meanwhile.
    if (this.#waiting.lengthBytes < lengthBytes) return;
    this.#waiting.drop(lengthBytes);
    this.#consume(lengthBytes, rttMs);
  }

  /** Looks whether an ACK is due now, which is the answer, and else makes sure that it will be. */
  considerAck(): boolean {
    const { windowBytes } = this.#window;
    const arrived = this.#incoming.acknowledgement - this.#told.received;
    const progress = Math.max(arrived, this.#incoming.limitWith(windowBytes) - this.#told.limit);
    const enough = progress >= Math.min(windowBytes / 2, mostAckStepBytes);
    if (enough || (this.#incoming.ended && arrived > 0)) this.#ackDue = true;
    if (progress > 0 && !this.#ackDue) this.#timer ??= setTimeout(() => this.#ackLater(), this.#ackDelayMs);
    return this.#ackDue;
  }

  /** A new connection: the peer is told where we are. */
  restart(): void {
    this.#ackDue = true;
  }

  /** No ACKs any more until `restart`. */
  pause(): void {
    clearTimeout(this.#timer);
    this.#timer = undefined;
  }

  /** Forgets what waits; the session has failed. */
  clear(): void {
    this.pause();
    this.#waiting.clear();
  }

  /** The ACK that is due, to be sent now. */
  take(): Buffer[] {
    if (!this.#ackDue) return [];
    this.pause();
    this.#ackDue = false;
    this.#incoming.grant(this.#window.windowBytes);
    this.#told = this.position;
    return [encodeFrame({ type: 'ack', ...this.#told })];
  }

  #consume(lengthBytes: number, rttMs: number | undefined): void {
    this.#incoming.consume(lengthBytes);
    this.#untunedBytes += lengthBytes;
    if (this.#untunedBytes < tuneStepBytes) return;
    this.#window.consumed(this.#untunedBytes, performance.now(), rttMs);
    this.#untunedBytes = 0;
  }

  #ackLater(): void {
    this.#timer = undefined;
    this.#ackDue = true;
    this.#onAckDue();
  }
}
