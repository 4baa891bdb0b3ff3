/**
 * Pages that the destination has asked for: because its guest waits for one, or because one could not be made out of what
 * came. What was asked for goes by itself, so that it waits for nothing; what lies behind it follows, and is pushed on
 * from there.
 */
import type { EngineStatistics } from '../../model/migration.ts';
import type { BatchSender } from './batch-sender.ts';
import type { Course } from './course.ts';
import { agentError } from './frames.ts';
import type { PageBatch } from './page-batch.ts';
import type { PendingPages } from './pending-pages.ts';
import type { PushPace } from './push-pace.ts';

/** With a page that is asked for come those behind it, which a guest mostly wants next. */
const prefetchPages = 16;
/** Requests that may wait; a destination asks for each page once. */
const mostRequests = 65_536;

/** What relays are to have. */
export interface RelaysPart {
  hasBegun: boolean;
  /** All pages are to be had from them alone. */
  takesAll: boolean;
}

export interface PageRequestsOptions {
  course: Course;
  pages: PendingPages;
  sender: BatchSender;
  pace: PushPace;
  /** `undefined` where nothing is relayed. */
  relays: RelaysPart | undefined;
  statistics: EngineStatistics;
}

export class PageRequests {
  readonly #options: PageRequestsOptions;
  readonly #waiting: { page: number; plain: boolean }[] = [];
  /** The page that the guest asked for last. */
  #last = 0;

  constructor(options: PageRequestsOptions) {
    this.#options = options;
  }

  get isEmpty(): boolean {
    return this.#waiting.length === 0;
  }

  /** A frame of the destination's. */
  add(body: Buffer): void {
    const { pages, pace } = this.#options;
    const plain = body[0] === 1;
    if (!plain) pace.noteWant();
    for (let at = 1; at + 4 <= body.length; at += 4) {
      const page = body.readUInt32BE(at);
      if (page >= pages.count || this.#waiting.length >= mostRequests)
        throw agentError(`a request for page ${page}`);
      this.#waiting.push({ page, plain });
    }
  }

  /** Sends what was asked for first, and as much as goes with it. */
  answer(): void {
    const { sender } = this.#options;
    const batch = sender.takeEmpty();
    const behind = sender.takeEmpty();
    const plain = this.#waiting[0]!.plain;
    while (this.#waiting[0]?.plain === plain && !batch.isFull && !behind.isFull) {
      const { page } = this.#waiting.shift()!;
      if (plain) this.#repair(batch, page);
      else this.#take(batch, behind, page);
    }
    sender.send(batch, plain);
    sender.send(behind, plain);
  }

  #repair(batch: PageBatch, page: number): void {
    const { course, pages, statistics } = this.#options;
    statistics.repairedPages += 1;
    pages.read(batch, page, 1);
    // While the VM runs it may change again, and then it is pending all the same.
    if (course.state === 'serving') pages.pending.delete(page);
  }

  #take(batch: PageBatch, behind: PageBatch, page: number): void {
    const { pages, relays, statistics } = this.#options;
    statistics.requestedPages += 1;
    // If it is not pending it is on its way, or relays have it or are about to.
    if (relays?.takesAll) {
      pages.read(batch, page, 1);
      return;
    }
    pages.take(batch, page, 1);
    // Memory that a guest got page by page often lies in it from the end to the beginning.
    const isBackwards = page < this.#last && page >= this.#last - prefetchPages;
    this.#last = page;
    const from = isBackwards ? Math.max(0, page - prefetchPages) : page + 1;
    const end = isBackwards ? page : page + prefetchPages;
    for (const [first, count] of pages.pending.runs(from, end)) {
      pages.take(behind, first, count);
      if (behind.isFull) break;
    }
    if (!relays?.hasBegun && !isBackwards) pages.goOnFrom(end);
  }
}
