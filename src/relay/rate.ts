/** How fast something gets done, in bytes per second, smoothed; counted only while there is something to do. */

/** How quickly it follows. */
const smoothing = 0.25;
/** It is measured over at least this long, or so many bytes. */
const leastMs = 50;
const enoughBytes = 5 * 1024 * 1024;

export class Rate {
  #since = performance.now();
  #bytes = 0;
  #bytesPerSecond: number | undefined;

  /** `undefined` before the first. */
  get bytesPerSecond(): number | undefined {
    return this.#bytesPerSecond;
  }

  /** There was nothing to do until now. */
  begin(): void {
    this.#since = performance.now();
    this.#bytes = 0;
  }

  note(bytes: number): void {
    this.#bytes += bytes;
    const now = performance.now();
    const tookMs = now - this.#since;
    if (tookMs < leastMs && this.#bytes < enoughBytes) return;
    const rate = (this.#bytes * 1000) / Math.max(1, tookMs);
    const before = this.#bytesPerSecond;
    this.#bytesPerSecond = before === undefined ? rate : before + smoothing * (rate - before);
    this.#since = now;
    this.#bytes = 0;
  }
}
