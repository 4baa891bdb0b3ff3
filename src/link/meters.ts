/** What a session measures about its path. Time comes from the caller, in milliseconds. */

/** Half a minute of them. A path that becomes longer in the middle of a connection is known by then. */
const keptRoundTrips = 30;

/** The smoothed round trip, as TCP does it: each sample moves it by an eighth. */
export class RoundTripMeter {
  #smoothedMs: number | undefined;
  #latestMs: number[] = [];

  get rttMs(): number | undefined {
    return this.#smoothedMs;
  }

  /**
   * The shortest of the last few: what the path itself takes. The others have waited behind bytes of our own, and a
   * window that is sized by them makes the next one wait even longer.
   */
  get leastRttMs(): number | undefined {
    return this.#latestMs.length === 0 ? undefined : Math.min(...this.#latestMs);
  }

  sample(rttMs: number): void {
    this.#latestMs.push(rttMs);
    if (this.#latestMs.length > keptRoundTrips) this.#latestMs.shift();
    this.#smoothedMs =
      this.#smoothedMs === undefined ? rttMs : this.#smoothedMs + (rttMs - this.#smoothedMs) / 8;
  }

  /** A new connection may take another path. */
  reset(): void {
    this.#smoothedMs = undefined;
    this.#latestMs = [];
  }
}

const sampleMs = 100;
/** The rest of a burst is worth a sample from here on. */
const shortSampleMs = 20;
const keptSamples = 10;

/**
 * The rate at which bytes arrive, as BBR estimates it: the best of the last samples, since a sender that had
 * nothing to send makes a sample poorer than the path, and nothing makes it much better.
 */
export class DeliveryMeter {
  #samples: number[] = [];
  #startMs: number | undefined;
  #bytes = 0;

  /** Bits per second; 0 before anything has arrived. */
  get rateBps(): number {
    return Math.max(0, ...this.#samples);
  }

  /** Bytes were acknowledged. A sample spans at least a round trip. */
  delivered(lengthBytes: number, nowMs: number, rttMs = 0): void {
    if (this.#startMs === undefined) {
      // The first acknowledgement only starts the watch: how long its bytes took is not known.
      this.#startMs = nowMs;
      return;
    }
    this.#bytes += lengthBytes;
    this.#sampleAfter(Math.max(sampleMs, rttMs), nowMs);
  }

  /** Nothing is in flight any more, or the connection is gone: the silence that follows does not count. */
  pause(nowMs: number): void {
    this.#sampleAfter(shortSampleMs, nowMs);
    this.#startMs = undefined;
    this.#bytes = 0;
  }

  #sampleAfter(leastMs: number, nowMs: number): void {
    const elapsedMs = nowMs - (this.#startMs ?? nowMs);
    if (elapsedMs < leastMs || this.#bytes === 0) return;
    this.#samples.push((this.#bytes * 8000) / elapsedMs);
    if (this.#samples.length > keptSamples) this.#samples.shift();
    this.#startMs = nowMs;
    this.#bytes = 0;
  }
}
