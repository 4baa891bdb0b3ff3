/**
 * Which pending pages go without being asked for, and in which order: what has changed here and there while the VM still
 * runs; what its QEMU needs there, and what it writes all the time, before it runs again; then the rest of that, in turns
 * with what lies behind the last page that was asked for.
 */
import type { BatchSender } from './batch-sender.ts';
import type { Course } from './course.ts';
import type { PendingPages } from './pending-pages.ts';
import type { PushPace } from './push-pace.ts';
import type { QemuRounds } from './qemu-rounds.ts';

/** So long the link may take for what changes most before the VM runs at the destination, which would ask for it at once. */
const hotMs = 80;
/** A link that never had much to carry is taken for no slower than this. */
const leastBytesPerSecond = 1e6;
/** At a time, so that what is too much is noticed soon. */
const hotPages = 64;
const hotBatches = 2;

export interface PagePusherOptions {
  course: Course;
  pages: PendingPages;
  sender: BatchSender;
  pace: PushPace;
  rounds: QemuRounds;
}

export class PagePusher {
  readonly #options: PagePusherOptions;
  #isScatteredSent = false;
  /** Pages to push first, as far as they are still pending: the hottest first. */
  #warm: number[] = [];
  #warmAt = 0;
  #isWarmDue = false;

  constructor(options: PagePusherOptions) {
    this.#options = options;
  }

  /** There was nothing more to send when `sendScattered` last looked. */
  get isScatteredSent(): boolean {
    return this.#isScatteredSent;
  }

  /** Pages that were hot when the VM stood still. */
  get hotPages(): number {
    return this.#warm.length;
  }

  /**
   * While the VM runs and the link has nothing else: pages that have changed here and there, and not in the rounds of
   * sampling. The guest may only read them now, so their heat says nothing; it would ask for one after the other. Those
   * that it writes again meanwhile are pending again.
   */
  async sendScattered(): Promise<void> {
    const { course, pages, sender, pace, rounds } = this.#options;
    let scattered: number[] = [];
    while (!course.isEnded && !course.isLeaving) {
      if (scattered.length === 0) {
        scattered = rounds.heat.scattered(pages.pending);
        this.#isScatteredSent = scattered.length === 0;
      }
      if (scattered.length > 0 && pace.isLinkClear) {
        const batch = sender.takeEmpty();
        for (const page of scattered.splice(0, pace.pagesAtOnce))
          if (pages.pending.has(page)) pages.take(batch, page, 1);
        sender.send(batch, false);
      }
      await pace.pause();
    }
  }

  /**
   * What the destination lacks of pages that its QEMU reads before the VM runs, whose numbers it gives. `isCopied`: they
   * are for others to bring, too.
   */
  sendNeeded(needed: readonly number[], { isCopied }: { isCopied: boolean }): number[] {
    const { pages, sender } = this.#options;
    const lacking = needed.filter((page) => pages.isLacking(page));
    for (let at = 0; at < lacking.length; at += hotPages) {
      const batch = sender.takeEmpty();
      for (const page of lacking.slice(at, at + hotPages)) {
        if (isCopied) pages.read(batch, page, 1);
        else pages.take(batch, page, 1);
        if (!isCopied) pages.deleteEarly(page);
      }
      sender.send(batch, false);
    }
    return lacking;
  }

  /**
   * The VM stands still, and would ask first of all for the pages that it writes all the time: a round trip for each.
   * So they go before it runs, the hottest first, as many as the link takes in a moment.
   */
  async sendHot(): Promise<void> {
    const { pages, sender, rounds } = this.#options;
    const hot = rounds.heat.hot(pages.pending);
    this.#warm = hot;
    const startedAt = performance.now();
    let leftBytes = ((sender.outbox.speed ?? leastBytesPerSecond) * hotMs) / 1000;
    const making = new Set<Promise<void>>();
    for (let at = 0; at < hot.length && leftBytes > 0; at += hotPages) {
      if (performance.now() - startedAt > hotMs) break;
      const batch = sender.takeEmpty();
      for (const page of hot.slice(at, at + hotPages)) {
        pages.take(batch, page, 1);
        pages.deleteEarly(page);
      }
      const made = sender.dispatch(batch, false).then((pieces) => {
        leftBytes -= pieces.reduce((sum, { length }) => sum + length, 0);
        making.delete(made);
      });
      making.add(made);
      if (making.size >= hotBatches) await Promise.race(making);
    }
    await Promise.all(making);
  }

  /** The next few: what was hot, or what lies where pages go on. */
  push(): void {
    const { pages, sender, pace } = this.#options;
    const batch = sender.takeEmpty();
    const most = pace.pagesAtOnce;
    this.#isWarmDue = !pace.isRestless || !this.#isWarmDue;
    while (this.#isWarmDue && this.#warmAt < this.#warm.length && batch.dataPages < most && !batch.isFull) {
      const page = this.#warm[this.#warmAt++]!;
      if (pages.pending.has(page)) pages.take(batch, page, 1);
    }
    if (batch.isEmpty) pages.takeInOrder(batch, most);
    sender.send(batch, false);
  }
}
