/**
 * Before the VM runs at the destination, pages are put into the memory of its QEMU from outside, past its stream: each
 * page in its stream costs QEMU more CPU than all that we do to make it.
 *
 * QEMU empties its memory when it hears of a post-copy that may come, so a page of zeroes that was never anything else
 * is nothing to write. QEMU does not know of pages that came this way, which matters in post-copy alone: it may ask for
 * one that is not there and that nobody misses, which is one of zeroes; and when a post-copy goes on over another link,
 * what it takes for missing counts only where it was missing when the VM began to run.
 */
import { pageBytes } from '../../stream/index.ts';
import type { WritableRam } from './guest-memory.ts';
import { PageSet } from './page-set.ts';
import type { PageRun } from './rebuilder.ts';

const zeroPages = 64;
const zeroes = Buffer.alloc(zeroPages * pageBytes);

export class PlacedPages {
  readonly #ram: WritableRam;
  /** With content, or such that had some before. */
  readonly #written: PageSet;

  /** Throws `unsupported` where nothing can be put into that memory. */
  constructor(ram: WritableRam, pages: number) {
    this.#ram = ram;
    this.#written = new PageSet(pages);
    ram.write(0, 1, zeroes);
  }

  take(runs: readonly PageRun[]): void {
    for (const { page, count, content } of runs) {
      if (content) {
        this.#ram.write(page, count, content);
        this.#written.addRange(page, count);
      } else for (const [first, some] of this.#written.runs(page, page + count)) this.#clear(first, some);
    }
  }

  #clear(first: number, count: number): void {
    for (let done = 0; done < count; done += zeroPages)
      this.#ram.write(first + done, Math.min(zeroPages, count - done), zeroes);
  }
}
