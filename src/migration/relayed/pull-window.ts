/**
 * How many slabs may be on their way at once while nobody waits for them. As many as keep the link busy and no more, for
 * what a guest waits for stands behind them: it grows while slabs come as quickly as they can, and shrinks when they
 * begin to queue. How quickly they can is seen when one goes alone, as one does now and then. Pure: times in, a number
 * out.
 */
const least = 2;
const most = 32;
/** Slabs whose time is this many times the shortest have queued. */
const quick = 1.6;
const late = 2.2;
/** With each slab the shortest time is believed a little less: the path may change. */
const aging = 1.0005;
/** After so many slabs one goes alone. */
const aloneEvery = 400;
const smoothing = 0.2;
/** So long a link may be busy between two pages that a guest asks for one after the other. */
const betweenMs = 40;
const typicalParts = 8;

export class PullWindow {
  #slabs = 4;
  #shortestMs = Number.POSITIVE_INFINITY;
  #typicalMs = 0;
  #sinceAlone = 0;
  /** What a part takes on the link alone; 0 before the first. */
  #partMs = 0;

  get slabs(): number {
    return this.#sinceAlone >= aloneEvery ? 1 : Math.floor(this.#slabs);
  }

  /** How long a slab takes; 0 before the first. */
  get typicalMs(): number {
    return this.#typicalMs;
  }

  /** While the guest asks for one page after the other: whether a slab is more than may come in between. */
  get isSlow(): boolean {
    return this.partsBetween(typicalParts) < typicalParts;
  }

  /** And how much of one that has so many parts may. */
  partsBetween(parts: number): number {
    return this.#partMs === 0 ? parts : Math.min(parts, Math.max(1, Math.floor(betweenMs / this.#partMs)));
  }

  /** So many parts have come, while nothing else was on its way, so long after the first byte of them could. */
  noteParts(parts: number, tookMs: number): void {
    const partMs = Math.max(0.01, tookMs / parts);
    this.#partMs = this.#partMs === 0 ? partMs : this.#partMs + smoothing * (partMs - this.#partMs);
  }

  /** A slab has come after so long; `wasAlone`: no other was on its way when it was asked for. */
  note(tookMs: number, wasAlone: boolean): void {
    this.#sinceAlone = wasAlone ? 0 : this.#sinceAlone + 1;
    this.#shortestMs = wasAlone ? tookMs : Math.min(this.#shortestMs * aging, tookMs);
    this.#typicalMs =
      this.#typicalMs === 0 ? tookMs : this.#typicalMs + smoothing * (tookMs - this.#typicalMs);
    // One more in the time of a window's worth of slabs.
    if (tookMs < this.#shortestMs * quick) this.#slabs += 1 / this.#slabs;
    if (tookMs > this.#shortestMs * late) this.#slabs -= 1 / this.#slabs;
    this.#slabs = Math.min(most, Math.max(least, this.#slabs));
  }
}
