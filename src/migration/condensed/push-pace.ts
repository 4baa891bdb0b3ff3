/**
 * How much goes to a destination that runs the VM without being asked for: what keeps the link busy and no more, since a
 * page that the guest waits for stands behind it; and next to nothing while the guest asks for one page after the other.
 */
import type { Duplex } from 'node:stream';
import { pageBytes } from '../../stream/index.ts';
import { isClear, isShallow, statsOf } from './in-flight.ts';
import type { Outbox } from './outbox.ts';

/** Pushed at once while the guest waits for others: short, so that what it asks for is not long in coming. */
const pushPages = 64;
const leastPushPages = 8;
/** Of what is pushed at once on a slow link. */
const pushMs = 20;
/** The same while the guest asks for one page after the other. */
const restlessPushMs = 5;
/** A guest that has asked for something lately is about to ask for more. */
const calmMs = 300;
const shallowPollMs = 2;

export interface PushPaceOptions {
  link: Duplex;
  outbox: Outbox;
}

export class PushPace {
  readonly #options: PushPaceOptions;
  /** When the destination last asked for something, and what the link carried before it did. */
  #wantedAt = Number.NEGATIVE_INFINITY;
  #calmRateBps = 0;

  constructor(options: PushPaceOptions) {
    this.#options = options;
  }

  noteWant(): void {
    this.#wantedAt = performance.now();
  }

  /** What the link carries now is what it can, as far as one knows. */
  noteRate(): void {
    this.#calmRateBps = statsOf(this.#options.link)?.deliveryRateBps ?? 0;
  }

  /** The guest has asked for something lately, and is about to ask for more. */
  get isRestless(): boolean {
    return performance.now() - this.#wantedAt <= calmMs;
  }

  /** Fewer on a slow link. */
  get pagesAtOnce(): number {
    const stats = statsOf(this.#options.link);
    if (!stats) return pushPages;
    const [rateBps, ms] = this.isRestless
      ? [this.#calmRateBps, restlessPushMs]
      : [stats.deliveryRateBps, pushMs];
    const pages = Math.floor(((rateBps / 8000) * ms) / pageBytes);
    return Math.min(pushPages, Math.max(leastPushPages, pages));
  }

  /** Nothing waits, and what is under way is little more than fills the link. */
  get isLinkOpen(): boolean {
    const { link, outbox } = this.#options;
    return outbox.isIdle && isShallow(link);
  }

  /** Nothing waits, and what is under way does not even fill the link. */
  get isLinkClear(): boolean {
    const { link, outbox } = this.#options;
    return outbox.isIdle && isClear(link, statsOf(link)?.deliveryRateBps ?? 0);
  }

  /** Until more may be pushed, or something else has come up. */
  async untilMoreMayGo(hasOtherWork: () => boolean): Promise<void> {
    const { link, outbox } = this.#options;
    await outbox.room(1);
    if (!this.isRestless) this.noteRate();
    const mayPush = () =>
      this.isRestless ? outbox.isIdle && isClear(link, this.#calmRateBps) : isShallow(link);
    while (!hasOtherWork() && !mayPush()) await this.pause();
  }

  /** Before one looks at the link again. */
  async pause(): Promise<void> {
    await this.#options.outbox.pause(shallowPollMs);
  }
}
