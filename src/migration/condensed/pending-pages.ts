/**
 * At the source: which pages the destination is still to get out of the VM's memory (*pending*), and how they are read
 * from there. Reading a page later than QEMU did is safe at any time: QEMU clears its dirty bit before it reads it.
 *
 * Where relays get each page once while the VM still runs, a pending page is *fresh* as long as nobody has read it; a page
 * that relays have, or are about to, is *early*, and *stale* once the VM has written it again.
 */
import type { EngineStatistics } from '../../model/migration.ts';
import { isZeroBlock } from '../../pages/index.ts';
import { type BlockTable, pageBytes } from '../../stream/index.ts';
import type { GuestRam } from './guest-memory.ts';
import type { PageBatch } from './page-batch.ts';
import { PageSet } from './page-set.ts';

/** Read at once. */
const readPages = 64;

export interface PendingPagesOptions {
  memory: GuestRam | undefined;
  statistics: EngineStatistics;
}

export class PendingPages {
  readonly #options: PendingPagesOptions;
  readonly #scratch = Buffer.alloc(readPages * pageBytes);
  #table: BlockTable | undefined;
  #pending = new PageSet(0);
  /** Pages that QEMU has not written even once. */
  #unseen = new PageSet(0);
  #fresh = new PageSet(0);
  #early = new PageSet(0);
  #stale = new PageSet(0);
  /** Where pages that go in order go on. */
  #next = 0;

  constructor(options: PendingPagesOptions) {
    this.#options = options;
  }

  begin(table: BlockTable): void {
    const { pages } = table;
    this.#table = table;
    this.#pending = new PageSet(pages);
    this.#unseen = new PageSet(pages);
    this.#unseen.addRange(0, pages);
    this.#fresh = new PageSet(pages);
    this.#early = new PageSet(pages);
    this.#stale = new PageSet(pages);
  }

  /** How many pages there are. */
  get count(): number {
    return this.#pending.pages;
  }

  get pending(): PageSet {
    return this.#pending;
  }

  get fresh(): PageSet {
    return this.#fresh;
  }

  get stale(): PageSet {
    return this.#stale;
  }

  /** QEMU has written this page: true for the first time. */
  see(page: number): boolean {
    return this.#unseen.delete(page);
  }

  /** It will be read later. */
  putOff(page: number): void {
    this.#pending.add(page);
    if (this.#early.has(page)) this.#stale.add(page);
    else this.#fresh.add(page);
  }

  /** Whatever QEMU has not written when it is done. */
  putOffUnseen(): void {
    this.addRuns(this.#unseen.runs());
  }

  addRuns(runs: readonly (readonly [number, number])[]): void {
    for (const [first, count] of runs) this.#pending.addRange(first, count);
  }

  /** What an earlier agent has left. */
  restore(bits: Uint8Array): void {
    this.#pending = PageSet.fromBytes(this.#table!.pages, bits);
  }

  /** Whether the destination has not got it. */
  isLacking(page: number): boolean {
    return this.#pending.has(page) || this.#early.has(page);
  }

  /** What the destination has not got: what is pending, and what is nowhere but with relays. */
  missing(): PageSet {
    const missing = PageSet.fromBytes(this.#table!.pages, this.#pending.toBytes());
    missing.addAll(this.#early);
    return missing;
  }

  /** Relays do not have it, whatever was said before. */
  deleteEarly(page: number): void {
    this.#early.delete(page);
  }

  /** Pages that go in order go on from this one. */
  goOnFrom(page: number): void {
    this.#next = page;
  }

  /** Into the batch, after which they are pending no more. */
  take(batch: PageBatch, first: number, count: number): void {
    this.read(batch, first, count);
    for (let page = first; page < first + count; page++) {
      this.#pending.delete(page);
      this.#fresh.delete(page);
    }
  }

  /** So many at most, round and round. */
  takeInOrder(batch: PageBatch, most: number): void {
    for (let taken = 0; taken < most && this.#pending.size > 0; ) {
      const run = this.#nextRun(this.#pending, most - taken);
      if (!run) continue;
      const [first, count] = run;
      this.take(batch, first, count);
      taken += count;
    }
  }

  /**
   * From where pages go on up to so many of `from` with content, out of no more than `mostScanned`, since most of a guest
   * may be zero. Gives the runs of zeroes among them, which are not in the batch.
   */
  takeContent(
    batch: PageBatch,
    options: { from: PageSet; most: number; mostScanned: number },
  ): [number, number][] {
    const { from, most, mostScanned } = options;
    const zeroes: [number, number][] = [];
    for (let scanned = 0; scanned < mostScanned && batch.dataPages < most; ) {
      const isFromStart = this.#next === 0;
      const run = this.#nextRun(from, most - batch.dataPages);
      if (!run && isFromStart) break;
      if (!run) continue;
      const [first, count] = run;
      this.take(batch, first, count);
      if (from === this.#fresh) this.#early.addRange(first, count);
      scanned += count;
      zeroes.push(...batch.takeZeroes());
    }
    return zeroes;
  }

  /** `undefined` at the end, from where it goes on at the beginning. */
  #nextRun(from: PageSet, most: number): [number, number] | undefined {
    const first = from.next(this.#next);
    if (first < 0) {
      this.#next = 0;
      return undefined;
    }
    const [[, count]] = from.runs(first, first + most) as [[number, number]];
    this.#next = first + count;
    return [first, count];
  }

  /** Into the batch, whether they are pending or not. */
  read(batch: PageBatch, first: number, count: number): void {
    const startedAt = performance.now();
    const table = this.#table!;
    const { memory, statistics } = this.#options;
    for (let done = 0; done < count; ) {
      const block = table.blocks[table.blockOf(first + done)]!;
      const some = Math.min(count - done, readPages, block.firstPage + block.pages - first - done);
      memory!.read(first + done, some, this.#scratch);
      for (let index = 0; index < some; index++) {
        const page = first + done + index;
        if (isZeroBlock(this.#scratch, index * pageBytes)) batch.addZero(page);
        else batch.addPage(page, this.#scratch, index * pageBytes);
      }
      done += some;
    }
    statistics.cpuMs.read += performance.now() - startedAt;
  }
}
