/** What a session measures about its path. Time comes from the caller, in milliseconds. */

/** The smoothed round trip, as TCP does it: each sample moves it by an eighth. */
export class RoundTripMeter {
  #smoothedMs: number | undefined;
  #leastMs: number | undefined;

  /** The shortest one: what the path takes when nothing waits in it. */
  get leastRttMs(): number | undefined {
    return this.#leastMs;
  }

  get rttMs(): number | undefined {
    return this.#smoothedMs;
  }

  sample(rttMs: number): void {
    this.#leastMs = Math.min(this.#leastMs ?? rttMs, rttMs);
    this.#smoothedMs =
      this.#smoothedMs === undefined ? rttMs : this.#smoothedMs + (rttMs - this.#smoothedMs) / 8;
  }

  /** A new connection may take another path. */
  reset(): void {
    this.#smoothedMs = undefined;
    this.#leastMs = undefined;
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
