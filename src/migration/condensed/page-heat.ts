/**
 * How often a guest writes each page, as QEMU's rounds show, and what follows from that for the pages that are pending when
 * it leaves: what is *hot* it will ask for at once, and what it only touched here and there it may read at any time.
 */
import type { PageSet } from './page-set.ts';

/** Pages that change together in so long a run are data that is worked through, and not what a guest keeps coming back to. */
const scatteredPages = 64;
const mostHeat = 255;

export class PageHeat {
  /** In how many rounds each page was written. */
  readonly #heat: Uint8Array;
  #rounds = 0;

  constructor(pages: number) {
    this.#heat = new Uint8Array(pages);
  }

  /** From here on it is counted. */
  begin(): void {
    this.#heat.fill(0);
    this.#rounds = 0;
  }

  noteRounds(count: number): void {
    this.#rounds += count;
  }

  note(page: number): void {
    if (this.#heat[page]! < mostHeat) this.#heat[page]! += 1;
  }

  /**
   * Of these pages those that are hot, the hottest first. What was written in one long run is worked through: it is needed
   * again when all of it has had its turn, and so it counts only where it was written every other round.
   */
  hot(pending: PageSet): number[] {
    const hot: number[] = [];
    const isWarm = (page: number) => this.#heat[page]! > 0 && pending.has(page);
    for (let first = pending.next(0); first >= 0; first = pending.next(first)) {
      let end = first;
      while (end < pending.pages && isWarm(end)) end += 1;
      const leastHeat = end - first <= scatteredPages ? 1 : this.#rounds / 2;
      for (let page = first; page < end; page++) if (this.#heat[page]! >= leastHeat) hot.push(page);
      first = Math.max(end, first + 1);
    }
    return hot.sort((a, b) => this.#heat[b]! - this.#heat[a]!);
  }

  /** Of these pages those that changed here and there, and were not written since counting began; the shortest runs first. */
  scattered(pending: PageSet): number[] {
    const runs = pending.runs().filter(([, count]) => count <= scatteredPages);
    runs.sort(([, a], [, b]) => a - b);
    return runs
      .flatMap(([first, count]) => Array.from({ length: count }, (_, index) => first + index))
      .filter((page) => this.#heat[page] === 0);
  }
}
