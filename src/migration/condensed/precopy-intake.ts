/**
 * The side of the source's agent towards QEMU: takes its pre-copy in, where each page goes on or is put off, as far as the
 * agent is; reads it as fast as the link takes it, or slowly to see what the guest writes; and answers those who steer QEMU.
 */
import type { Readable } from 'node:stream';
import type { EngineStatistics } from '../../model/migration.ts';
import { delay } from '../../qmp/index.ts';
import { type BlockTable, commandBytes, pageBytes } from '../../stream/index.ts';
import type { MemoryDivision } from '../relayed/memory-division.ts';
import type { BatchSender } from './batch-sender.ts';
import type { Course } from './course.ts';
import { encodeFrame, frame } from './frames.ts';
import type { PagePusher } from './page-pusher.ts';
import type { PendingPages } from './pending-pages.ts';
import { bytesFrom } from './qemu-bytes.ts';
import { QemuPrecopy } from './qemu-precopy.ts';
import type { QemuRounds } from './qemu-rounds.ts';

/** QEMU's rounds while it is read slowly. */
const sampleRoundMs = 40;

export interface PrecopyIntakeOptions {
  course: Course;
  rounds: QemuRounds;
  pages: PendingPages;
  sender: BatchSender;
  pusher: PagePusher;
  division: MemoryDivision | undefined;
  /** Each page goes to relays once before the VM leaves. */
  dividesFirst: boolean;
  /** Pages may be put off: they can be read later. */
  canDrain: boolean;
  /** The blocks of the VM's memory are known. */
  onBlocks: (table: BlockTable) => void;
  /** All before the first page is known: the opening of the stream, and the number of the section of RAM. */
  onLayout: (opening: Buffer, sectionId: number) => void;
  signal: AbortSignal;
  statistics: EngineStatistics;
}

export class PrecopyIntake {
  readonly #options: PrecopyIntakeOptions;
  readonly #precopy: QemuPrecopy;
  /** The first round, which may be in many buffers when QEMU is through with it. */
  #firstRound: Promise<void> | undefined;
  #isFirstRoundTaken = false;
  #isDrainWanted = false;
  #scattering: Promise<void> = Promise.resolve();

  constructor(options: PrecopyIntakeOptions) {
    this.#options = options;
    const { sender } = options;
    this.#precopy = new QemuPrecopy({
      blocks: options.onBlocks,
      layout: options.onLayout,
      page: (page, buffer, at) => {
        if (this.#isSentNow(page)) sender.addPage(page, buffer, at);
      },
      zeroPage: (page) => {
        if (this.#isSentNow(page)) sender.addZero(page);
      },
      command: (code, payload) => {
        sender.flush();
        sender.outbox.send(encodeFrame(frame.command, commandBytes(code, payload)));
      },
    });
  }

  /** From now on pages are put off, if they may be. */
  drain(): void {
    const { canDrain, course, sender } = this.#options;
    if (course.state !== 'copying' || !canDrain) return;
    this.#isDrainWanted = true;
    sender.outbox.kick();
  }

  /**
   * It has drained long enough to know which pages the guest writes all the time, and relays that are to have all of it
   * first have it.
   */
  get isSampled(): boolean {
    const { canDrain, division, dividesFirst, pusher, rounds } = this.#options;
    if (!canDrain) return true;
    if (dividesFirst && division?.isFilled === false) return false;
    return rounds.isSampled(() => !division && !pusher.isScatteredSent);
  }

  /** The destination has not taken the first round yet. */
  get isBehind(): boolean {
    return !this.#isFirstRoundTaken && this.#options.course.state === 'copying';
  }

  /** QEMU has begun another round. */
  noteRound(round: number): void {
    const { course, division, pusher, rounds, sender, statistics } = this.#options;
    if (!rounds.note(round)) return;
    this.#firstRound ??= sender.untilTaken().then(() => {
      this.#isFirstRoundTaken = true;
    });
    // Waited for where the stream is read.
    this.#firstRound.catch(() => {});
    if (course.state === 'draining' && !rounds.isSampling) {
      rounds.beginToSample();
      if (!division) this.#scattering = pusher.sendScattered();
      // Waited for when the stream has ended.
      this.#scattering.catch(() => {});
    }
    // What a round finds as it was sent already was written before it was read: the last round has no time for that.
    const changedBytes = statistics.guestBytes - statistics.pages.unchanged * pageBytes;
    rounds.measure(changedBytes, sender.outbox.madeBytes);
  }

  /** Bytes of the guest's changes that the link takes in a second; `undefined` while nobody knows. */
  get changesPerSecond(): number | undefined {
    const { rounds, sender } = this.#options;
    const { speed } = sender.outbox;
    return speed === undefined ? undefined : speed / Math.max(0.01, rounds.ratio);
  }

  /** The stream to its end. Gives what is behind the last page; `undefined` when all of it went on as it was. */
  async take(qemu: Readable): Promise<Buffer | undefined> {
    const { course, division, rounds, sender, signal } = this.#options;
    const { outbox } = sender;
    let isPlain = false;
    for await (const bytes of bytesFrom(qemu)) {
      if (this.#isDrainWanted && course.state === 'copying' && !isPlain) await this.#beginToDrain();
      else if (this.isBehind && !isPlain) await this.#firstRound;
      division?.noteWritten(bytes.length);
      if (isPlain) outbox.send(encodeFrame(frame.rest, bytes));
      else isPlain = this.#isUnknown(bytes);
      sender.flushIfIdle();
      // What is only noted needs no room.
      while ((isPlain || course.state === 'copying') && !outbox.hasRoom) await outbox.change();
      if (this.#precopy.takeSectionEnd() && rounds.isSampling && !this.isSampled)
        await Promise.race([delay(sampleRoundMs, signal), outbox.failed]);
    }
    if (isPlain) return undefined;
    this.#precopy.end();
    course.isLeaving = true;
    await this.#scattering;
    sender.flush();
    return this.#precopy.takeTail();
  }

  async #beginToDrain(): Promise<void> {
    await this.#options.sender.untilTaken();
    this.#options.course.state = 'draining';
  }

  /** True when the stream goes on as it is, since it holds what we do not know. */
  #isUnknown(bytes: Uint8Array): boolean {
    const unknown = this.#precopy.push(bytes);
    if (!unknown) return false;
    this.#options.statistics.fallback = unknown.reason;
    this.#options.sender.outbox.send(encodeFrame(frame.rest, ...unknown.rest));
    return true;
  }

  /** Whether a page goes as QEMU has written it; if not, it is read later. */
  #isSentNow(page: number): boolean {
    const { course, pages, rounds } = this.#options;
    if (!pages.see(page)) rounds.heat.note(page);
    if (course.state === 'copying') return true;
    pages.putOff(page);
    return false;
  }
}
