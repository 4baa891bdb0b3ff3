/**
 * At the source: what of the VM's memory goes to relays, and when. While the VM runs, each page that QEMU has written once,
 * as fast as relays take it; when it has left, what the destination does not take as fast as it is read. When nothing is
 * pending any more the destination hears that it does not need us.
 */
import type { Duplex } from 'node:stream';
import { setImmediate as nextTurn } from 'node:timers/promises';
import type { EngineStatistics } from '../../model/migration.ts';
import { KiB } from '../../model/units.ts';
import { delay } from '../../qmp/index.ts';
import { pageBytes } from '../../stream/index.ts';
import type { BatchSender } from '../condensed/batch-sender.ts';
import type { Course } from '../condensed/course.ts';
import { encodeFrame, encodeWord, frame } from '../condensed/frames.ts';
import { statsOf } from '../condensed/in-flight.ts';
import type { PagePusher } from '../condensed/page-pusher.ts';
import type { PageRequests, RelaysPart } from '../condensed/page-requests.ts';
import type { PendingPages } from '../condensed/pending-pages.ts';
import type { PushPace } from '../condensed/push-pace.ts';
import type { QemuRounds } from '../condensed/qemu-rounds.ts';
import type { Divider } from './divider.ts';
import { RelayGate } from './relay-gate.ts';
import { SlabMaker } from './slab-maker.ts';

/** Relays take the rest in such a time: then it goes to them alone. */
const endMs = 400;
const earlyPollMs = 5;
/** When the VM is about to leave, its last state stands behind what relays are being sent. */
const leavingMs = 300;
const leavingQueueMs = 100;
const shallowPollMs = 2;
/** While QEMU writes as fast as it can, relays wait: each round is over sooner, and with it the last one. */
const busyBytes = 32 * KiB;
const busyMs = 3;
/** The first round is long, and they wait in it only while they have something to carry. */
const busyQueueMs = 50;
/** Frames that may wait for the link beside pages: where slabs are is a few bytes each. */
const mostWords = 63;

export interface MemoryDivisionOptions {
  /** With relays that are open. */
  divider: Divider;
  /** All pages are to be had from relays alone, also those that the destination asks for. */
  dividesAll: boolean;
  /** They get everything once before the VM leaves. */
  dividesFirst: boolean;
  course: Course;
  rounds: QemuRounds;
  pages: PendingPages;
  sender: BatchSender;
  pace: PushPace;
  link: Duplex;
  signal: AbortSignal;
  statistics: EngineStatistics;
}

export class MemoryDivision implements RelaysPart {
  readonly #options: MemoryDivisionOptions;
  readonly #slabs: SlabMaker;
  readonly #gate = new RelayGate();
  #hasBegun = false;
  /** What the destination is to be told of slabs, and has not been. */
  readonly #words: Buffer[] = [];
  /** When QEMU last had much to write. */
  #busyAt = Number.NEGATIVE_INFINITY;
  /** The destination was told that nothing is pending any more. */
  #isDivided = false;

  constructor(options: MemoryDivisionOptions) {
    this.#options = options;
    this.#slabs = new SlabMaker(options);
  }

  /** The destination hears of the relays, and slabs may be made. */
  begin(): void {
    const { course, divider, pages } = this.#options;
    this.#hasBegun = true;
    divider.begin({
      tell: (bytes) => this.#tell(bytes),
      giveBack: (runs) => {
        pages.addRuns(runs);
        this.#isDivided = false;
      },
      wake: () => course.wake(),
    });
  }

  get hasBegun(): boolean {
    return this.#hasBegun;
  }

  /** With too few relays it is a post-copy like any other. */
  get takesAll(): boolean {
    const { dividesAll, divider } = this.#options;
    return dividesAll && divider.isUsable;
  }

  /** Relays have had each page that was to go to them, or there are too few of them. */
  get isFilled(): boolean {
    const { divider, pages } = this.#options;
    return !divider.isUsable || (pages.fresh.size === 0 && divider.isSettled);
  }

  /** Sealed bytes that went to relays from here. */
  get sentBytes(): number {
    return this.#options.divider.sentBytes;
  }

  /** QEMU has written so much at once. */
  noteWritten(bytes: number): void {
    if (bytes >= busyBytes) this.#busyAt = performance.now();
  }

  /** The VM has stopped: what it wrote after relays had it is nothing that the destination may take from them. */
  tellStale(): void {
    const { divider, pages } = this.#options;
    if (this.#hasBegun) divider.addStale(pages.stale.runs());
  }

  /** While the VM runs: what QEMU has written once, as fast as relays take it. */
  async divideEarly(): Promise<void> {
    const { course, divider, pages, signal } = this.#options;
    while (!course.isEnded && !course.isLeaving) {
      const isReady = this.#hasBegun && course.state === 'draining' && pages.fresh.size > 0;
      if (isReady && divider.hasRoom && this.#isEarlyTurn) this.#slabs.makeOne(true);
      else {
        await Promise.race([delay(earlyPollMs, signal), course.woken]);
        course.rearm();
      }
      await nextTurn();
    }
  }

  get #isEarlyTurn(): boolean {
    const { divider, dividesFirst, rounds } = this.#options;
    const isCalm = performance.now() - this.#busyAt > busyMs;
    if (!rounds.isSampling) return isCalm || divider.queuedMs < busyQueueMs;
    const isLeavingSoon = !dividesFirst && rounds.isSampledIn(leavingMs);
    return isCalm && (!isLeavingSoon || divider.queuedMs < leavingQueueMs);
  }

  /** The destination takes what it can, and relays the rest. */
  async serve(requests: PageRequests, pusher: PagePusher): Promise<void> {
    const { course, divider, pages, sender, signal } = this.#options;
    sender.outbox.failed.catch(() => course.wake());
    while (!course.isEnded) {
      const { woken } = course;
      const isPending = pages.pending.size > 0;
      if (!requests.isEmpty) requests.answer();
      else if (isPending && this.#isPushWanted) pusher.push();
      else if (isPending && divider.hasRoom && (this.takesAll || this.#isGateOpen))
        this.#slabs.makeOne(false);
      else {
        if (!isPending) this.#tellDivided();
        const isLinkAwaited = isPending && requests.isEmpty;
        const pause = isLinkAwaited ? delay(shallowPollMs, signal) : woken;
        await Promise.race([pause, woken]);
        course.rearm();
      }
      // What came in meanwhile is heard.
      await nextTurn();
      await sender.outbox.room(mostWords);
    }
  }

  #tellDivided(): void {
    const { divider, sender } = this.#options;
    if (!divider.isSettled || this.#isDivided || !this.#hasBegun) return;
    this.#isDivided = true;
    sender.outbox.send(encodeFrame(frame.divided, encodeWord(divider.size)));
  }

  get #isPushWanted(): boolean {
    return !this.takesAll && this.#options.pace.isLinkOpen && this.#isGuestCalm && !this.#isEndNear;
  }

  /** While the guest asks for one page after the other relays get the rest, if they are worth it. */
  get #isGuestCalm(): boolean {
    const { divider, pace } = this.#options;
    return !pace.isRestless || !divider.hasRoom || !this.#isGateOpen;
  }

  /** Relays take the rest in a moment: the last word would stand behind whatever goes to a slow destination now. */
  get #isEndNear(): boolean {
    const { divider, pages } = this.#options;
    const restBytes = pages.pending.size * pageBytes;
    return restBytes < (divider.bytesPerSecond * endMs) / 1000 && this.#isGateOpen;
  }

  /** Whether relays are worth it. One that says nothing of what has arrived may be slow. */
  get #isGateOpen(): boolean {
    const { divider, link } = this.#options;
    const stats = statsOf(link);
    if (!stats) return true;
    const { sentBytes, unacknowledgedBytes } = stats;
    const directBytes = sentBytes - unacknowledgedBytes;
    return this.#gate.isOpen({
      now: performance.now(),
      directBytes,
      relayedBytes: divider.placedBytes,
      relaysPerMs: divider.bytesPerSecond / 1000,
    });
  }

  /** Where slabs are is told in a few bytes each, which go together: each by itself would wait for its share of the uplink. */
  #tell(bytes: Buffer): void {
    this.#words.push(bytes);
    if (this.#words.length === 1) this.#options.sender.outbox.send(() => this.#words.splice(0));
  }
}
