/**
 * A token bucket that sessions share. Whoever wants to send waits in line and is granted one frame's worth at a time;
 * parties take turns, so those with equal wants get equal shares, however many sessions each has. The bucket may go
 * into debt by one grant, which the following wait pays back.
 */
import { AppError } from '../model/errors.ts';
import { KiB } from '../model/units.ts';

interface Request {
  lengthBytes: number;
  onGrant: () => void;
}

/** A bucket holds this much of the rate, which bounds a burst. */
const burstMs = 20;
const leastQuantumBytes = 1 * KiB;
const mostQuantumBytes = 256 * KiB;

export interface RateLimiterOptions {
  /** For tests. */
  nowMs?: () => number;
}

export class RateLimiter {
  readonly #nowMs: () => number;
  /** By party, the next one first. None is empty. */
  readonly #queue = new Map<unknown, Set<Request>>();
  #bytesPerMs: number | undefined;
  #tokens = 0;
  #filledAtMs = 0;
  #timer: NodeJS.Timeout | undefined;

  /** `rateBps` in bits per second; null for no limit. */
  constructor(rateBps: number | null, options: RateLimiterOptions = {}) {
    this.#nowMs = options.nowMs ?? (() => performance.now());
    this.setRate(rateBps);
  }

  get rateBps(): number | null {
    return this.#bytesPerMs === undefined ? null : this.#bytesPerMs * 8000;
  }

  /** The most to ask for at once: 10 ms of the rate. */
  get quantumBytes(): number {
    if (this.#bytesPerMs === undefined) return mostQuantumBytes;
    const wanted = Math.floor((this.#bytesPerMs * burstMs) / 2);
    return Math.min(mostQuantumBytes, Math.max(leastQuantumBytes, wanted));
  }

  /** Takes effect at once, for those who wait as well. */
  setRate(rateBps: number | null): void {
    if (rateBps !== null && !(Number.isFinite(rateBps) && rateBps > 0)) {
      throw new AppError(
        'invalid_request',
        `Cannot limit a rate to ${rateBps} bit/s: a positive number or null`,
        {
          problems: [{ field: 'rateBps', value: rateBps, wanted: 'a positive number, or null for no limit' }],
        },
      );
    }
    this.#fill();
    this.#bytesPerMs = rateBps === null ? undefined : rateBps / 8000;
    // Neither a burst nor a debt of the old rate outlives it.
    this.#tokens = Math.max(-this.quantumBytes, Math.min(this.#tokens, this.quantumBytes));
    this.#serve();
  }

  /**
   * Calls `onGrant` when so many bytes may go, maybe at once. The answer withdraws the request. Requests with the same
   * `party` share one share; without one each is for itself.
   */
  request(lengthBytes: number, onGrant: () => void, party?: object): () => void {
    const request = { lengthBytes, onGrant };
    const key = party ?? request;
    const waiting = this.#queue.get(key);
    if (waiting) waiting.add(request);
    else this.#queue.set(key, new Set([request]));
    this.#serve();
    return () => {
      const left = this.#queue.get(key);
      if (left?.delete(request) && left.size === 0) this.#queue.delete(key);
      if (this.#queue.size === 0) this.#rest();
    };
  }

  #serve(): void {
    this.#fill();
    // A party that waits for more goes to the end of the line, where this comes to it again.
    for (const [key, waiting] of this.#queue) {
      if (this.#bytesPerMs !== undefined && this.#tokens <= 0) break;
      const [request] = waiting;
      this.#queue.delete(key);
      waiting.delete(request!);
      if (waiting.size > 0) this.#queue.set(key, waiting);
      if (this.#bytesPerMs !== undefined) this.#tokens -= request!.lengthBytes;
      request!.onGrant();
    }
    this.#rest();
    if (this.#queue.size === 0 || this.#bytesPerMs === undefined) return;
    const waitMs = Math.max(1, Math.ceil(-this.#tokens / this.#bytesPerMs));
    this.#timer = setTimeout(() => this.#serve(), Math.min(waitMs, 60_000));
  }

  #rest(): void {
    clearTimeout(this.#timer);
    this.#timer = undefined;
  }

  #fill(): void {
    const nowMs = this.#nowMs();
    const elapsedMs = nowMs - this.#filledAtMs;
    this.#filledAtMs = nowMs;
    if (this.#bytesPerMs === undefined) return;
    const most = Math.max(this.quantumBytes, this.#bytesPerMs * burstMs);
    this.#tokens = Math.min(most, this.#tokens + elapsedMs * this.#bytesPerMs);
  }
}

/** Several limiters in a row: bytes go when each has granted them. */
export class Pacing {
  readonly #limiters: readonly RateLimiter[];
  readonly #party: object | undefined;
  #withdraw: (() => void) | undefined;

  constructor(limiters: readonly RateLimiter[], party?: object) {
    this.#limiters = limiters;
    this.#party = party;
  }

  get unlimited(): boolean {
    return this.#limiters.every(({ rateBps }) => rateBps === null);
  }
  get quantumBytes(): number {
    return Math.min(...this.#limiters.map((each) => each.quantumBytes));
  }
  /** A request is waiting. */
  get waiting(): boolean {
    return this.#withdraw !== undefined;
  }

  /** Calls `onGrant` once, maybe at once. One request at a time. */
  request(lengthBytes: number, onGrant: () => void): void {
    const ask = (index: number): void => {
      const limiter = this.#limiters[index];
      if (limiter === undefined) {
        this.#withdraw = undefined;
        onGrant();
        return;
      }
      let granted = false;
      const onLimiter = () => {
        granted = true;
        ask(index + 1);
      };
      const withdraw = limiter.request(lengthBytes, onLimiter, this.#party);
      if (!granted) this.#withdraw = withdraw;
    };
    ask(0);
  }

  withdraw(): void {
    this.#withdraw?.();
    this.#withdraw = undefined;
  }
}
