/**
 * Stands at the source between QEMU's mirror of the disk, for which it is an NBD server, and the relays: what the mirror
 * writes goes into slabs, as memory does, and the destination hears where they are.
 *
 * A write is answered when it is in a slab that is being made; only a flush waits until relays hold all of it. So a
 * mirror that has ended well says that relays have the disk. A block that is written again goes into a later slab, whose
 * higher number makes it the right one.
 *
 * What it cannot make a slab of, it reads back from QEMU, which has every write before the mirror does: blocks of which
 * only a part was written, and those of a slab whose relay is lost.
 */
import type { Socket } from 'node:net';
import type { Duplex } from 'node:stream';
import { AppError, asAppError } from '../../model/errors.ts';
import type { DivisionStatistics, EngineStatistics } from '../../model/migration.ts';
import { type Backend, NbdError, serveNbdOn } from '../../nbd/index.ts';
import { blockBytes, isZeroBlock } from '../../pages/index.ts';
import { delay } from '../../qmp/index.ts';
import { Condenser } from '../condensed/condenser.ts';
import { encodeNumbers, parseDiskOffer, parseNumbers } from '../condensed/disk-frames.ts';
import { firstOf, framesOf } from '../condensed/frame-stream.ts';
import { agentError, type Frame, frame } from '../condensed/frames.ts';
import { PageBatch } from '../condensed/page-batch.ts';
import { PageSet } from '../condensed/page-set.ts';
import { noStatistics } from '../condensed/statistics.ts';
import { exportName } from '../mirror.ts';
import { type Divider, partPages, type SlabContent } from './divider.ts';
import type { Run } from './division.ts';

export interface DiskDividerOptions {
  /** QEMU as the client of an NBD server. */
  qemu: Socket;
  link: Duplex;
  divider: Divider;
  /** As QEMU has it now; what lies behind the end of the disk is missing. */
  readBack: (offset: number, lengthBytes: number) => Promise<Buffer>;
  /** Nothing is to leave for now, and nothing is wrong with that. */
  isPaused?: () => boolean;
  /** How long relays may take nothing of what waits for them; a minute if missing. The guest's writes may wait as long. */
  stalledMs?: number;
}

/** Of a slab. */
const slabBlocks = 256;
const zeroes = Buffer.alloc(slabBlocks * blockBytes);
/** Writes that follow each other sooner go into one slab. */
const calmMs = 50;
/** Without enough relays. */
const patienceMs = 5000;
const pollMs = 100;
/** A link may be cut for some time, and goes on by itself. */
const defaultStalledMs = 60_000;
/** How often a disk may come back from relays as a whole. */
const mostReturns = 4;

export class DiskDivider implements Backend {
  readonly #options: DiskDividerOptions;
  readonly #statistics = noStatistics();
  sizeBytes = 0;
  #condenser: Condenser | undefined;
  /** What is not in a slab yet, by block. */
  #open = new Map<number, Buffer>();
  /** To be read back. */
  #again = new PageSet(0);
  #failure: AppError | undefined;
  #change = Promise.withResolvers<void>();
  #calm: NodeJS.Timeout | undefined;
  /** Ends that were told to the destination, and those of them that it has written down. */
  #ends = 0;
  #kept = 0;
  #mending: Promise<void> | undefined;
  readonly #broken = Promise.withResolvers<never>();
  #unusableSince: number | undefined;
  /** What was placed when that last changed, and when somebody waited for it last. */
  #progress = { bytes: -1, at: 0, askedAt: 0 };
  /** Blocks that came back from relays. */
  #returned = 0;

  constructor(options: DiskDividerOptions) {
    this.#options = options;
    this.#broken.promise.catch(() => {});
  }

  get statistics(): EngineStatistics {
    this.#statistics.wireBytes = this.#options.divider.sentBytes;
    return this.#statistics;
  }

  get division(): DivisionStatistics {
    return this.#options.divider.statistics;
  }

  /** Why it has come to nothing. */
  get failure(): AppError | undefined {
    return this.#failure;
  }

  /** Each block that the destination lacks is held, and kept, by as many relays as are wanted, and it has written down where. */
  get isSafe(): boolean {
    return this.#ends > 0 && this.#kept === this.#ends && this.#isPlaced && this.#options.divider.isProlonged;
  }

  /** Resolves when QEMU has taken its leave; the link then stays, for what is yet to be told. */
  async run(): Promise<void> {
    const { link, qemu } = this.#options;
    try {
      const frames = framesOf(link);
      this.#begin(await firstOf(frames, frame.diskOffer, 'offer of a disk'));
      this.#listen(frames).catch((error) => this.#fail(error));
      link.on('close', () => this.#fail(agentError('its end')));
      const served = serveNbdOn(qemu, { exportName, backend: this });
      served.catch(() => {});
      await Promise.race([served, this.#broken.promise]);
    } catch (error) {
      this.#fail(error);
      throw error;
    } finally {
      qemu.destroy();
    }
  }

  /**
   * The mirror has ended and the VM stands still: resolves when the destination has written down where its disk is.
   * Aborted, it rejects at once with `cancelled`; what is under way meets `close`.
   */
  async end(signal?: AbortSignal): Promise<void> {
    const cancelled = Promise.withResolvers<never>();
    const onAbort = () => cancelled.reject(new AppError('cancelled', 'The disk is not waited for any more'));
    signal?.addEventListener('abort', onAbort);
    if (signal?.aborted) onAbort();
    this.#options.divider.prolong();
    const ending = this.flush().then(() => this.#tellEnd());
    try {
      await Promise.race([ending, cancelled.promise]);
    } finally {
      signal?.removeEventListener('abort', onAbort);
    }
  }

  close({ drop }: { drop: boolean }): void {
    this.#fail(new AppError('cancelled', 'The disk does not go to relays any more'));
    this.#options.divider.end({ drop });
  }

  // --- what QEMU asks for

  async read(): Promise<Buffer> {
    throw new NbdError('EIO', 'a mirror is written and not read');
  }

  async write(offset: number, bytes: Buffer, { fua }: { fua: boolean }): Promise<void> {
    await this.#room();
    const end = offset + bytes.length;
    for (let block = Math.floor(offset / blockBytes); block * blockBytes < end; block += 1) {
      const [from, to] = [block * blockBytes - offset, (block + 1) * blockBytes - offset];
      if (from >= 0 && to <= bytes.length) this.#take(block, bytes.subarray(from, to));
      else this.#takePart(block, Math.max(0, -from), bytes.subarray(Math.max(0, from), to));
    }
    await this.#written(fua);
  }

  async writeZeroes(offset: number, lengthBytes: number, { fua }: { fua: boolean }): Promise<void> {
    const end = offset + lengthBytes;
    for (let at = offset; at < end; ) {
      const border = (Math.floor(at / zeroes.length) + 1) * zeroes.length;
      const next = Math.min(end, border);
      await this.write(at, zeroes.subarray(0, next - at), { fua: false });
      at = next;
    }
    await this.#written(fua);
  }

  /** What is read there afterwards is left open; zeroes are what both sides then agree on. */
  trim(offset: number, lengthBytes: number, options: { fua: boolean }): Promise<void> {
    return this.writeZeroes(offset, lengthBytes, options);
  }

  async flush(): Promise<void> {
    this.#seal();
    for (;;) {
      if (this.#failure) throw this.#failure;
      const { divider } = this.#options;
      const change = this.#change.promise;
      if (this.#again.size > 0 && divider.hasRoom) this.#readAgain();
      else if (this.#isPlaced) return;
      else await this.#relaysWithin(change);
    }
  }

  // ---

  #begin(body: Buffer): void {
    const { divider, link } = this.#options;
    const { sizeBytes } = parseDiskOffer(body);
    const pages = Math.ceil(sizeBytes / blockBytes);
    this.sizeBytes = sizeBytes;
    this.#again = new PageSet(pages);
    this.#condenser = new Condenser({
      pages,
      sets: [],
      destinationReads: false,
      linkSpeed: () => undefined,
      statistics: this.#statistics,
    });
    divider.begin({
      tell: (bytes) => void (link.writable && link.write(bytes)),
      giveBack: (runs) => {
        for (const [first, count] of runs) {
          this.#again.addRange(first, count);
          this.#returned += count;
        }
        // Relays that take nothing of what they say they would could go on like this for ever.
        if (this.#returned > mostReturns * pages) this.#fail(noRelays());
        this.#changed();
        // Nobody flushes any more when the mirror has ended.
        if (this.#ends > 0) this.#mend();
      },
      wake: () => this.#changed(),
    });
  }

  get #isPlaced(): boolean {
    return this.#open.size === 0 && this.#again.size === 0 && this.#options.divider.isSettled;
  }

  #take(block: number, bytes: Buffer): void {
    this.#again.delete(block);
    const known = this.#open.get(block);
    if (known) {
      bytes.copy(known);
      return;
    }
    if (this.#open.size >= slabBlocks) this.#seal();
    // The write's own bytes are QEMU's again when it is answered.
    this.#open.set(block, Buffer.from(bytes));
  }

  #takePart(block: number, at: number, bytes: Buffer): void {
    const known = this.#open.get(block);
    if (known) bytes.copy(known, at);
    else this.#again.add(block);
  }

  async #written(fua: boolean): Promise<void> {
    if (fua) return this.flush();
    clearTimeout(this.#calm);
    this.#calm = setTimeout(() => this.#seal(), calmMs);
  }

  /** What is open goes into a slab. */
  #seal(): void {
    if (this.#open.size === 0 || this.#failure) return;
    const content = this.#open;
    this.#open = new Map();
    const blocks = [...content.keys()].sort((a, b) => a - b);
    this.#add(blocks, async () => blocks.map((block) => content.get(block)!));
  }

  /** A slab's worth of what is to be read back. It is read when its slab has its number, so no older than that. */
  #readAgain(): void {
    const blocks: number[] = [];
    for (let block = this.#again.next(0); block >= 0 && blocks.length < slabBlocks; ) {
      blocks.push(block);
      this.#again.delete(block);
      block = this.#again.next(block + 1);
    }
    const { readBack } = this.#options;
    this.#add(blocks, async () => {
      const found: Buffer[] = [];
      for (const [first, count] of runsOf(blocks)) {
        const at = first * blockBytes;
        const bytes = await readBack(at, Math.min(count * blockBytes, this.sizeBytes - at));
        const padded = Buffer.concat([bytes], count * blockBytes);
        for (let each = 0; each < count; each += 1)
          found.push(padded.subarray(each * blockBytes, (each + 1) * blockBytes));
      }
      return found;
    });
  }

  #add(blocks: readonly number[], read: () => Promise<Buffer[]>): void {
    const runs = runsOf(blocks);
    this.#options.divider.add(async () => {
      try {
        return await this.#content(blocks, await read(), runs);
      } catch (error) {
        // To read it back once more would meet the same.
        this.#fail(error);
        throw error;
      }
    }, runs);
  }

  async #content(
    blocks: readonly number[],
    content: readonly Buffer[],
    runs: readonly Run[],
  ): Promise<SlabContent> {
    const parts: PageBatch[] = [];
    for (const [index, block] of blocks.entries()) {
      if (index % partPages === 0) parts.push(new PageBatch(partPages));
      const bytes = content[index]!;
      if (isZeroBlock(bytes)) parts.at(-1)!.addZero(block);
      else parts.at(-1)!.addPage(block, bytes, 0);
    }
    const condensed = await Promise.all(
      parts.map((part) => this.#condenser!.condense(part, { plain: true, onTaken: () => {} })),
    );
    // Without the frame's head: the slab has its own.
    return { parts: condensed.map(([, ...body]) => body), runs, alike: [] };
  }

  async #listen(frames: AsyncIterable<Frame>): Promise<void> {
    for await (const { type, body } of frames) {
      if (type !== frame.diskFlushed) throw agentError(`a frame of type ${type} out of place`);
      const [number] = parseNumbers(body);
      if (number > this.#ends) throw agentError(`an answer to end ${number} of ${this.#ends}`);
      this.#kept = number;
      this.#changed();
    }
    throw agentError('its end');
  }

  /** Resolves when it is written down there. */
  async #tellEnd(): Promise<void> {
    const { link } = this.#options;
    this.#ends += 1;
    const number = this.#ends;
    link.write(encodeNumbers(frame.diskFlush, [number]));
    while (this.#kept < number) {
      if (this.#failure) throw this.#failure;
      await this.#change.promise;
    }
  }

  /** A relay was lost when all had been told: what it held goes to another, as long as the disk is here. */
  #mend(): void {
    this.#mending ??= this.end()
      // Then it is not safe, and the source stays.
      .catch(() => {})
      .finally(() => {
        this.#mending = undefined;
        if (this.#again.size > 0 && !this.#failure && this.#options.divider.isUsable) this.#mend();
      });
  }

  async #room(): Promise<void> {
    const { divider } = this.#options;
    while (!divider.hasRoom) {
      if (this.#failure) throw this.#failure;
      await this.#relaysWithin(this.#change.promise);
    }
  }

  /**
   * Until something changed, or soon. As long as the guest's writes may wait for it, it fails when relays have been too few
   * for a while (none says at once what it takes), or have taken nothing.
   */
  async #relaysWithin(change: Promise<void>): Promise<void> {
    const hopeless = this.#ends === 0 ? this.#whyHopeless() : undefined;
    if (hopeless) {
      this.#fail(hopeless);
      throw hopeless;
    }
    await Promise.race([change, delay(pollMs)]);
  }

  #whyHopeless(): AppError | undefined {
    const now = performance.now();
    const { divider, isPaused, stalledMs = defaultStalledMs } = this.#options;
    if (divider.isUsable) this.#unusableSince = undefined;
    else this.#unusableSince ??= now;
    if (now - (this.#unusableSince ?? now) > patienceMs) return noRelays();
    // Nothing may have waited in between.
    const isNew =
      isPaused?.() === true ||
      divider.placedBytes !== this.#progress.bytes ||
      now - this.#progress.askedAt > stalledMs / 2;
    this.#progress = {
      bytes: divider.placedBytes,
      at: isNew ? now : this.#progress.at,
      askedAt: now,
    };
    if (now - this.#progress.at <= stalledMs) return undefined;
    return new AppError('peer_unreachable', `Relays have taken nothing of the disk for ${stalledMs} ms`, {});
  }

  #fail(error: unknown): void {
    this.#failure ??= asAppError(error);
    this.#broken.reject(this.#failure);
    clearTimeout(this.#calm);
    this.#changed();
  }

  #changed(): void {
    this.#change.resolve();
    this.#change = Promise.withResolvers();
  }
}

/** Runs of consecutive ones among ascending numbers. */
function runsOf(blocks: readonly number[]): [number, number][] {
  const runs: [number, number][] = [];
  for (const block of blocks) {
    const last = runs.at(-1);
    if (last && last[0] + last[1] === block) last[1] += 1;
    else runs.push([block, 1]);
  }
  return runs;
}

const noRelays = (): AppError =>
  new AppError(
    'insufficient_space',
    'There are not enough relays any more that would take the rest of the disk',
    {},
  );
