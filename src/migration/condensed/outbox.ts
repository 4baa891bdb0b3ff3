/**
 * Frames on their way to the link: in order, though some are still being compressed, and few of them, so that what is
 * urgent or last does not stand behind much else. Measures how fast the link takes them.
 */
import type { Writable } from 'node:stream';
import { KiB, MiB } from '../../model/units.ts';
import { delay } from '../../qmp/index.ts';
import { isShallow, statsOf } from './in-flight.ts';

/** So many frames may be under way; more only make the queue longer. */
const mostFrames = 4;
const smoothing = 0.2;
/** Below this in flight a link may be idle, and what it delivered says nothing of what it could. */
const busyBytes = 256 * KiB;
/** What a link delivers in its slow start says nothing either: it doubles with each round trip, until so much is through. */
const startBytes = MiB;
const startMs = 1000;
const shallowPollMs = 2;

export interface OutboxOptions {
  link: Writable;
  signal: AbortSignal;
  /** Bits per second, as wanted now; `undefined` for no limit. */
  limitBps: () => number | undefined;
  /** Whether what is sent next must not wait behind much. */
  isUrgent?: () => boolean;
  /**
   * So many bytes of frames may be made ahead of the link, so that it has something to carry while what is made next
   * takes time and gives little. None if absent.
   */
  reserveBytes?: () => number;
  /** The link has taken these pieces of a frame, which may be used again. */
  onSent?: (pieces: readonly Uint8Array[]) => void;
}

const sizeOf = (pieces: readonly Uint8Array[]): number => pieces.reduce((sum, { length }) => sum + length, 0);

export class Outbox {
  readonly #options: OutboxOptions;
  readonly #waiting: (() => void)[] = [];
  readonly #failed = Promise.withResolvers<never>();
  #failure: Error | undefined;
  /** Of the frame that is being written. */
  #written: PromiseWithResolvers<void> | undefined;
  #frames = 0;
  /** Of them: those that are still being made, and the bytes of those that are not. */
  #making = 0;
  #readyBytes = 0;
  #tail: Promise<void> = Promise.resolve();
  /** What was written of late, and how long that took: buffers take some frames at once, and then one for long. */
  #lateBytes = 0;
  #lateMs = 0;
  /** What the link delivered when it was last seen to be busy. */
  #busyBps = 0;
  /** The link took the last frame that was not small sooner than the limit allows. */
  #isLimited = false;
  /** When it was first seen to be busy without a break, and what it had delivered then. */
  #busySince: { bytes: number; at: number } | undefined;
  sentBytes = 0;
  /** Of all frames that were made, whether they have been sent or not. */
  madeBytes = 0;

  constructor(options: OutboxOptions) {
    this.#options = options;
    this.#failed.promise.catch(() => {});
    const close = () => this.#fail(new Error('The link is closed'));
    if (options.signal.aborted) close();
    options.signal.addEventListener('abort', close, { once: true });
    // It may break when nobody reads or writes it any more.
    options.link.on('error', (error) => this.#fail(error));
  }

  /** Beside the few frames that keep it going, more may wait that are made already, as far as there is a reserve. */
  get hasRoom(): boolean {
    if (this.#frames < mostFrames) return true;
    return this.#making < mostFrames && this.#readyBytes < (this.#options.reserveBytes?.() ?? 0);
  }

  get isIdle(): boolean {
    return this.#frames === 0;
  }

  /**
   * Bytes per second that the link takes while there is something to send; `undefined` when not measured yet, as on a link
   * that never had much to carry.
   */
  get speed(): number | undefined {
    const stats = statsOf(this.#options.link);
    if (!stats) return this.#lateBytes === 0 ? undefined : (this.#lateBytes * 1000) / this.#lateMs;
    const { deliveryRateBps, sentBytes, unacknowledgedBytes, unsentBytes } = stats;
    if (unacknowledgedBytes + unsentBytes < busyBytes) this.#busySince = undefined;
    else {
      const [bytes, at] = [sentBytes - unacknowledgedBytes, performance.now()];
      this.#busySince ??= { bytes, at };
      const isStarted = bytes - this.#busySince.bytes >= startBytes || at - this.#busySince.at >= startMs;
      if (isStarted && deliveryRateBps > 0) this.#busyBps = deliveryRateBps;
    }
    const limitBps = this.#isLimited ? this.#options.limitBps() : undefined;
    if (limitBps !== undefined) return Math.min(this.#busyBps || limitBps, limitBps) / 8;
    return this.#busyBps === 0 ? undefined : this.#busyBps / 8;
  }

  /**
   * Rejects when something could not be sent, or at the end. Not for a race that is run again and again: what is hung on
   * it stays until then.
   */
  get failed(): Promise<never> {
    return this.#failed.promise;
  }

  /** Resolves after so long. Throws as `failed` does, by then. */
  async pause(ms: number): Promise<void> {
    await delay(ms, this.#options.signal);
    if (this.#failure) throw this.#failure;
  }

  #fail(error: Error): void {
    this.#failure ??= error;
    this.#failed.reject(error);
    this.#written?.reject(error);
    this.#wake();
  }

  /** Resolves when the link has taken it, or can take nothing any more. A function is asked when its turn comes. */
  send(frame: Buffer | Promise<Uint8Array[]> | (() => Uint8Array[])): Promise<void> {
    if (typeof frame === 'function') {
      const inTurn = this.#tail.then(frame);
      inTurn.catch(() => {});
      return this.send(inTurn);
    }
    this.#frames += 1;
    this.#making += 1;
    const made = Promise.resolve(frame).then((pieces) => {
      const bytes = Buffer.isBuffer(pieces) ? [pieces] : pieces;
      this.#making -= 1;
      this.#readyBytes += sizeOf(bytes);
      this.madeBytes += sizeOf(bytes);
      this.#wake();
      return bytes;
    });
    // Waited for in its turn.
    made.catch(() => {});
    this.#tail = this.#tail
      .then(async () => {
        const pieces = await made;
        this.#readyBytes -= sizeOf(pieces);
        await this.#write(pieces);
      })
      .catch((error) => this.#fail(error))
      .finally(() => {
        this.#frames -= 1;
        this.#wake();
      });
    return this.#tail;
  }

  /** Resolves when something has changed: a frame was made or sent, or somebody says so by `kick`. */
  async change(): Promise<void> {
    if (!this.#failure)
      await new Promise<void>((resolve) => {
        this.#waiting.push(resolve);
      });
    if (this.#failure) throw this.#failure;
  }

  kick(): void {
    this.#wake();
  }

  #wake(): void {
    for (const wake of this.#waiting.splice(0)) wake();
  }

  /** Resolves when a frame may be added, or with `frames` when no more than so many are under way. */
  async room(frames?: number): Promise<void> {
    while (frames === undefined ? !this.hasRoom : this.#frames > frames) {
      await this.change();
    }
  }

  /** Calls back once, when there is room again. */
  onRoom(callback: () => void): void {
    this.#waiting.push(callback);
  }

  async #write(pieces: readonly Uint8Array[]): Promise<void> {
    const { link, signal, limitBps } = this.#options;
    const startedAt = performance.now();
    while (this.#options.isUrgent?.() && !isShallow(link)) await this.pause(shallowPollMs);
    const written = Promise.withResolvers<void>();
    this.#written = written;
    // It may have failed while this one was made.
    if (this.#failure) written.reject(this.#failure);
    link.cork();
    for (const [index, piece] of pieces.entries())
      link.write(piece, (error) => {
        if (error) written.reject(error);
        else if (index === pieces.length - 1) written.resolve();
      });
    link.uncork();
    await written.promise;
    this.#options.onSent?.(pieces);
    const frameBytes = sizeOf(pieces);
    this.sentBytes += frameBytes;
    const limit = limitBps();
    const dueMs = limit === undefined ? 0 : (frameBytes * 8000) / limit;
    const tookMs = performance.now() - startedAt;
    const isLimited = dueMs > tookMs + 1;
    if (isLimited) await delay(dueMs - tookMs, signal);
    // Small frames vanish in buffers, and say nothing.
    if (frameBytes <= 32_768) return;
    this.#isLimited = isLimited;
    this.#lateBytes = this.#lateBytes * (1 - smoothing) + frameBytes;
    this.#lateMs = this.#lateMs * (1 - smoothing) + Math.max(0.05, performance.now() - startedAt);
  }
}
