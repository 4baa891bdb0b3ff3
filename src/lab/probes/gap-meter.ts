/** The silences between signs of life, the longest above all. Times are milliseconds of one clock. */
export interface Gap {
  fromMs: number;
  toMs: number;
  ms: number;
}

const maxKept = 1000;

export class GapMeter {
  readonly #thresholdMs: number;
  #last: number | undefined;
  #longest: Gap | undefined;
  /** Those of at least the threshold, the first thousand. */
  readonly gaps: Gap[] = [];

  constructor(thresholdMs = 100) {
    this.#thresholdMs = thresholdMs;
  }

  sign(atMs: number): void {
    this.#note(atMs);
    this.#last = atMs;
  }

  /** The silence that lasts until now counts as well: who never hears again has seen the longest one. */
  end(atMs: number): void {
    this.#note(atMs);
    this.#last = undefined;
  }

  get longest(): Gap | undefined {
    return this.#longest;
  }

  #note(toMs: number): void {
    const fromMs = this.#last;
    if (fromMs === undefined) return;
    const gap = { fromMs, toMs, ms: toMs - fromMs };
    if (!this.#longest || gap.ms > this.#longest.ms) this.#longest = gap;
    if (gap.ms >= this.#thresholdMs && this.gaps.length < maxKept) this.gaps.push(gap);
  }
}
