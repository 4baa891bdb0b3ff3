/**
 * At the custodian of a VM whose destination is lost: the VM as it left its source, out of relays alone. It is given to
 * a QEMU that stands still, as an ordinary pre-copy, and nothing runs before all of it is there.
 */
import type { Duplex, Writable } from 'node:stream';
import { AppError } from '../../model/errors.ts';
import { pageBytes, startSection } from '../../stream/index.ts';
import { PageFeed } from '../condensed/page-feed.ts';
import { PageSet } from '../condensed/page-set.ts';
import { type PageRun, Rebuilder, unpack } from '../condensed/rebuilder.ts';
import type { Run } from './division.ts';
import type { Manifest } from './manifest.ts';
import type { WholeStream } from './memory-merging.ts';
import { Merger } from './merger.ts';

export interface RestoreOptions {
  /** A socket on which QEMU listens. */
  qemu: Writable;
  manifest: Manifest;
  whole: WholeStream;
  /** A session of the manifest's group with the relay of this number. */
  open: (relay: number) => Promise<Duplex>;
  signal: AbortSignal;
}

export class Restore {
  readonly #options: RestoreOptions;
  readonly #merger: Merger;
  readonly #feed: PageFeed;
  readonly #rebuilder: Rebuilder;
  /** What QEMU has not got. */
  readonly #missing: PageSet;
  readonly #lost = Promise.withResolvers<never>();
  /** Pages go to QEMU one slab after the other. */
  #turn: Promise<unknown> = Promise.resolve();

  constructor(options: RestoreOptions) {
    this.#options = options;
    const { manifest, qemu, open } = options;
    const { sectionId, table } = manifest.layout;
    this.#missing = new PageSet(table.pages);
    this.#missing.addRange(0, table.pages);
    this.#feed = new PageFeed(qemu, sectionId, table);
    this.#rebuilder = new Rebuilder({ pages: table.pages, sets: [], memory: undefined });
    this.#lost.promise.catch(() => {});
    this.#merger = new Merger({
      manifest,
      open,
      missing: this.#missing,
      place: (body, slab) => this.#inTurn(() => this.#place(body, slab)),
      placeZeroes: (runs) => this.#inTurn(() => this.#placeZeroes(runs)),
      onLost: (message) =>
        this.#lost.reject(
          new AppError('not_found', `The memory is not whole any more: ${message}`, {
            kind: 'slab',
          }),
        ),
    });
  }

  /** Of its pages, how many QEMU has. */
  get progress(): { done: number; total: number } {
    const { pages } = this.#options.manifest.layout.table;
    return { done: pages - this.#missing.size, total: pages };
  }

  /** Resolves when QEMU has got all of it. Throws `not_found` for memory that no relay has any more. */
  async run(): Promise<void> {
    const { qemu, manifest, whole, signal } = this.#options;
    const { sectionId, table } = manifest.layout;
    const uncovered = manifest.firstUncovered(this.#missing);
    if (uncovered >= 0)
      throw new AppError('not_found', `Nobody was told where page ${uncovered} of the memory is`, {
        kind: 'page',
      });
    const broken = Promise.withResolvers<never>();
    broken.promise.catch(() => {});
    qemu.on('error', broken.reject);
    const onAbort = () => broken.reject(signal.reason);
    signal.addEventListener('abort', onAbort, { once: true });
    signal.throwIfAborted();
    try {
      await Promise.race([
        this.#write(whole, startSection(sectionId, table)),
        this.#lost.promise,
        broken.promise,
      ]);
    } finally {
      signal.removeEventListener('abort', onAbort);
    }
  }

  /** `drop`: nobody needs it any more, and relays may forget it. */
  end({ drop }: { drop: boolean }): Promise<void> {
    return this.#merger.end({ drop });
  }

  async #write({ opening, tail }: WholeStream, start: Buffer): Promise<void> {
    await this.#feed.write(opening);
    await this.#feed.write(start);
    await this.#merger.run();
    await this.#turn;
    await this.#feed.end();
    await this.#feed.write(tail);
    this.#options.qemu.end();
  }

  #inTurn(work: () => Promise<void>): Promise<void> {
    const turn = this.#turn.then(work);
    this.#turn = turn.catch(this.#lost.reject);
    return turn;
  }

  async #place(body: Buffer, slab: number): Promise<void> {
    const { manifest } = this.#options;
    const { runs, missed } = await this.#rebuilder.rebuild(await unpack(body));
    if (missed.length > 0)
      throw new AppError('not_found', `Slab ${slab} refers to what is not in it`, { kind: 'slab' });
    const placed: PageRun[] = [];
    for (const { page, count, content } of runs)
      for (let each = page; each < page + count; each++) {
        const at = (each - page) * pageBytes;
        const part = content?.subarray(at, at + pageBytes);
        for (const target of manifest.pagesOf(slab, each))
          if (this.#missing.delete(target)) placed.push({ page: target, count: 1, content: part });
      }
    await this.#feed.pages(placed);
  }

  async #placeZeroes(runs: readonly Run[]): Promise<void> {
    const placed: PageRun[] = [];
    for (const [first, count] of runs)
      for (let page = first; page < first + count; page++)
        if (this.#missing.delete(page)) placed.push({ page, count: 1, content: undefined });
    await this.#feed.pages(placed);
  }
}
