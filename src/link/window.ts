/**
 * How large a window a receiver grants: twice what its reader took in one round trip, as in TCP's receive buffer
 * tuning. It doubles each round trip while the reader keeps up, so a long fast path is filled after a few of them,
 * and a slow link never has megabytes of old bytes standing in front of fresh ones. It shrinks, slowly, when much
 * less is taken.
 */

/** Round trips shorter than this say more about the event loop than about the path. */
const leastRoundMs = 4;
/** So many poor rounds one after the other halve the window. */
const poorRoundsToShrink = 16;

export class WindowTuner {
  readonly #leastBytes: number;
  readonly #mostBytes: number;
  #windowBytes: number;
  #roundStartMs: number | undefined;
  #roundBytes = 0;
  #poorRounds = 0;

  constructor(leastBytes: number, mostBytes: number) {
    this.#leastBytes = leastBytes;
    this.#mostBytes = mostBytes;
    this.#windowBytes = leastBytes;
  }

  get windowBytes(): number {
    return this.#windowBytes;
  }

  /** The reader took bytes; `rttMs` is undefined as long as nobody has measured it. */
  consumed(lengthBytes: number, nowMs: number, rttMs: number | undefined): void {
    this.#roundStartMs ??= nowMs;
    this.#roundBytes += lengthBytes;
    if (rttMs === undefined) return;
    const roundMs = Math.max(rttMs, leastRoundMs);
    const elapsedMs = nowMs - this.#roundStartMs;
    if (elapsedMs < roundMs) return;
    this.#adapt(2 * this.#roundBytes * (roundMs / elapsedMs));
    this.#roundStartMs = nowMs;
    this.#roundBytes = 0;
  }

  #adapt(wantedBytes: number): void {
    if (wantedBytes > this.#windowBytes) {
      this.#windowBytes = Math.min(this.#mostBytes, Math.ceil(wantedBytes), 2 * this.#windowBytes);
      this.#poorRounds = 0;
    } else if (wantedBytes > this.#windowBytes / 4) {
      this.#poorRounds = 0;
    } else {
      this.#poorRounds += 1;
      if (this.#poorRounds < poorRoundsToShrink) return;
      this.#windowBytes = Math.max(this.#leastBytes, Math.floor(this.#windowBytes / 2));
      this.#poorRounds = 0;
    }
  }
}
