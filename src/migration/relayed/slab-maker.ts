/**
 * At the source: makes slabs out of pending pages. What both ends hold, what is in a slab already and zeroes need no room
 * on relays.
 */
import type { EngineStatistics } from '../../model/migration.ts';
import { digestBlocks, digestBytes } from '../../pages/index.ts';
import { pageBytes } from '../../stream/index.ts';
import type { BatchSender } from '../condensed/batch-sender.ts';
import type { PageBatch } from '../condensed/page-batch.ts';
import type { PendingPages } from '../condensed/pending-pages.ts';
import { type Divider, partPages, type SlabContent } from './divider.ts';
import type { AlikePage } from './division.ts';

/** Pages of a slab: what a guest waits for comes as a whole slab, and each has its cost. */
const slabPages = 64;
/** Pages that are looked at for one slab: most of a guest may be zero. */
const scannedPages = 512;

export interface SlabMakerOptions {
  divider: Divider;
  pages: PendingPages;
  sender: BatchSender;
  statistics: EngineStatistics;
}

export class SlabMaker {
  readonly #options: SlabMakerOptions;

  constructor(options: SlabMakerOptions) {
    this.#options = options;
  }

  /** Up to a slab of pending pages for relays; `isEarly`: while the VM runs, of those that nobody has read. */
  makeOne(isEarly: boolean): void {
    const { divider, pages, sender } = this.#options;
    const batch = sender.takeEmpty();
    const from = isEarly ? pages.fresh : pages.pending;
    const zeroes = pages.takeContent(batch, { from, most: slabPages, mostScanned: scannedPages });
    if (zeroes.length > 0) divider.addZeroes(zeroes);
    if (batch.isEmpty) sender.giveBack(batch);
    else divider.add((slab) => this.#fill(slab, batch, isEarly), batch.dataRuns);
  }

  async #fill(slab: number, batch: PageBatch, isEarly: boolean): Promise<SlabContent | undefined> {
    const { sender } = this.#options;
    const { condenser } = sender;
    if (condenser.hasSets) await this.#sendKnown(batch, isEarly);
    if (batch.isEmpty) {
      sender.giveBack(batch);
      return undefined;
    }
    const alike = this.#takeAlike(slab, batch);
    const runs = batch.dataRuns;
    const parts: PageBatch[] = [];
    for (let first = 0; first < batch.dataPages; first += partPages) parts.push(batch.part(first, partPages));
    sender.giveBack(batch);
    const condensed = await Promise.all(
      parts.map((part) => condenser.condense(part, { plain: true, onTaken: () => {} })),
    );
    // Without the frame's head: the slab has its own.
    return { parts: condensed.map(([, ...body]) => body), runs, alike };
  }

  /** What both ends hold leaves the batch: it is told to the destination in a few bytes. */
  async #sendKnown(batch: PageBatch, isEarly: boolean): Promise<void> {
    const { sender } = this.#options;
    const isKnown = await sender.condenser.inSets(batch);
    const known = sender.takeEmpty();
    if (isKnown.includes(true)) batch.move(isKnown, known);
    // While the VM runs they may change before they are there.
    if (isEarly) this.#takeBack(known);
    else sender.send(known, false);
  }

  /** What is in a slab already leaves the batch. */
  #takeAlike(slab: number, batch: PageBatch): AlikePage[] {
    const { divider, sender, statistics } = this.#options;
    const startedAt = performance.now();
    const digests = digestBlocks(batch.content.subarray(0, batch.dataPages * pageBytes));
    const alike: AlikePage[] = [];
    const isAlike = batch.entries.map(({ page }, index) => {
      const digest = digests.subarray(index * digestBytes, (index + 1) * digestBytes);
      const found = divider.like(digest, slab, page);
      if (found) alike.push({ page, slab: found.slab, like: found.page });
      return found !== undefined;
    });
    statistics.cpuMs.digest += performance.now() - startedAt;
    if (alike.length > 0) {
      const others = sender.takeEmpty();
      batch.move(isAlike, others);
      sender.giveBack(others);
    }
    return alike;
  }

  #takeBack(batch: PageBatch): void {
    const { pages, sender } = this.#options;
    const runs = batch.dataRuns;
    pages.addRuns(runs);
    for (const [first, count] of runs)
      for (let page = first; page < first + count; page++) pages.deleteEarly(page);
    sender.giveBack(batch);
  }
}
