/**
 * How fast a guest dirties its memory, from what QEMU tells during pre-copy. QEMU's own rate is that of the last whole
 * second and 0 when it is done, so each pass is measured as well: what is left when a pass begins was dirtied during
 * the one before. A page that was written twice in a pass counts once. Pure; times in milliseconds.
 */
import type { MigrationInfo } from '../qmp/index.ts';

/** Shorter passes say nothing: QEMU is asked only so often. */
const shortestPassMs = 20;

export class DirtyMeter {
  #pass: { number: number; beganAt: number } | undefined;
  #measuredBytes = 0;
  #measuredMs = 0;
  #latestBps = 0;
  #maxBps = 0;

  note({ status, ram }: MigrationInfo, atMs: number): void {
    if (!ram || status !== 'active') return;
    const byQemuBps = ram['dirty-pages-rate'] * ram['page-size'] * 8;
    if (byQemuBps > 0) this.#saw(byQemuBps);
    const number = ram['dirty-sync-count'];
    if (number === this.#pass?.number) return;
    const before = this.#pass;
    this.#pass = { number, beganAt: atMs };
    // The first pass begins with all of the memory; and one that was missed would lend its bytes to another.
    if (!before || number !== before.number + 1 || atMs - before.beganAt < shortestPassMs) return;
    this.#measuredBytes += ram.remaining;
    this.#measuredMs += atMs - before.beganAt;
    this.#saw((ram.remaining * 8000) / (atMs - before.beganAt));
  }

  /** Bits per second, as seen last. */
  get latestBps(): number {
    return this.#latestBps;
  }

  get maxBps(): number {
    return this.#maxBps;
  }

  /** Over all passes that were measured; without one, as seen last. */
  get meanBps(): number {
    return this.#measuredMs > 0
      ? Math.round((this.#measuredBytes * 8000) / this.#measuredMs)
      : this.#latestBps;
  }

  #saw(bps: number): void {
    this.#latestBps = Math.round(bps);
    this.#maxBps = Math.max(this.#maxBps, this.#latestBps);
  }
}
