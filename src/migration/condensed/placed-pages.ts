/**
 * Before the VM runs at the destination, pages are put into the memory of its QEMU from outside, past its stream: each
 * page in its stream costs QEMU more CPU than all that we do to make it.
 *
 * QEMU empties its memory when it hears of a post-copy that may come, so a page of zeroes that was never anything else
 * is nothing to write. QEMU does not know of pages that came this way, which matters in post-copy alone: it may ask for
 * one that is not there and that nobody misses, which is one of zeroes; and when a post-copy goes on over another link,
 * what it takes for missing counts only where it was missing when the VM began to run.
 */
import type { MemoryWriter, PagePiece } from './guest-memory.ts';
import { PageSet } from './page-set.ts';
import type { PageRun } from './rebuilder.ts';

/** Batches that are not written yet. The pages of so many are not read back, and their places not used again. */
const mostWaiting = 4;

export class PlacedPages implements AsyncDisposable {
  readonly #writer: MemoryWriter;
  /** With content, or such that had some before. */
  readonly #written: PageSet;
  readonly #waiting: Promise<void>[] = [];

  constructor(writer: MemoryWriter, pages: number) {
    this.#writer = writer;
    this.#written = new PageSet(pages);
  }

  /** Throws `unsupported` where nothing can be put into that memory. */
  async begin(): Promise<void> {
    await this.#writer.write([{ page: 0, count: 1, at: undefined }]);
  }

  /** Resolves when there is room for more. Throws what a write before met. */
  async take(runs: readonly PageRun[]): Promise<void> {
    const pieces: PagePiece[] = [];
    for (const { page, count, content } of runs) {
      if (content) {
        pieces.push({ page, count, at: content.byteOffset });
        this.#written.addRange(page, count);
      } else
        for (const [first, some] of this.#written.runs(page, page + count))
          pieces.push({ page: first, count: some, at: undefined });
    }
    if (pieces.length === 0) return;
    const writing = this.#writer.write(pieces);
    // Waited for in its turn.
    writing.catch(() => {});
    this.#waiting.push(writing);
    if (this.#waiting.length > mostWaiting) await this.#waiting.shift();
  }

  /** Resolves when all of it is there. */
  async whole(): Promise<void> {
    await Promise.all(this.#waiting.splice(0));
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#writer[Symbol.asyncDispose]();
  }
}
