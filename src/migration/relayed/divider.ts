/**
 * At the source: takes what the destination lacks, seals it and puts it on relays, and tells the destination where it
 * is. A slab counts as placed when as many relays as wanted say that they hold it; until then, and whenever one of them
 * is lost, its pages are the source's to give.
 */
import { randomBytes } from 'node:crypto';
import type { Uuid } from '../../model/ids.ts';
import type { DivisionStatistics } from '../../model/migration.ts';
import { KiB, MiB } from '../../model/units.ts';
import { keyBytes, Seal } from '../../relay/index.ts';
import { Borrowing } from './borrowing.ts';
import {
  type AlikePage,
  bytesOf,
  type Division,
  encodeAlike,
  encodeDivision,
  encodeSlab,
  encodeStale,
  encodeZeroes,
  type Run,
} from './division.ts';
import { place } from './placement.ts';
import { type Content, Pool } from './pool.ts';
import { type RelayEnd, RelayEnds } from './relay-ends.ts';
import { SlabPlacer } from './slab-placer.ts';

export interface DividerOptions {
  migrationId: Uuid;
  relays: readonly RelayEnd[];
  /** How many relays hold each slab. */
  replicas: number;
  /** With other VMs; missing where it shares with none. */
  pool?: Pool | undefined;
  /** How long it waits for a slab of theirs that is not with relays yet; 15 s if missing. */
  patienceMs?: number;
}

export interface SlabContent {
  /** Of each part the body of a batch that refers to nothing. None if all of it is alike. */
  parts: readonly (readonly Uint8Array[])[];
  /** Its pages. */
  runs: readonly Run[];
  /** Pages with content that is in slabs already, as `like` has said. */
  alike: AlikePage[];
}

/** What of the source's agent it works for. */
export interface DividerHost {
  /** To the destination, in this order. */
  tell: (frame: Buffer) => void;
  /** These pages are in no slab, or in one that is not safe any more. */
  giveBack: (runs: readonly Run[]) => void;
  /** Something has changed for who waits for it. */
  wake: () => void;
}

/** Pages of a part: at 20 Mbit/s a guest that waits for one waits 13 ms for what comes with it. */
export const partPages = 8;
/** Sealed bytes that may wait for their relays. */
const mostInFlightBytes = 32 * MiB;
const mostSlabsInFlight = 128;
/** Of a slab, to ask for room before it is made. */
const typicalBytes = 256 * KiB;
/** Slabs that are being condensed: what is urgent waits behind them for the same few threads. */
const mostInTheMaking = 2;
const defaultPatienceMs = 15_000;

interface Placed {
  /** Its own pages there: none in a borrowed one. */
  runs: readonly Run[];
  holders: Set<number>;
}

export class Divider {
  readonly #options: DividerOptions;
  readonly #pool: Pool;
  readonly #group = randomBytes(keyBytes).toString('hex');
  readonly #seal: Seal;
  readonly #relays: RelayEnds;
  readonly #placer: SlabPlacer;
  readonly #borrowing: Borrowing;
  readonly #placed = new Map<number, Placed>();
  #isEnded = false;
  #host: DividerHost | undefined;
  #inFlight = { slabs: 0, bytes: 0 };
  #making = 0;
  #slabs = 0;
  #placedBytes = 0;
  #zeroPages = 0;
  #alikePages = 0;
  #borrowedPages = 0;
  /** Of slabs that are placed, or are to be: pages that were said to be like theirs. */
  readonly #sharers = new Map<number, number[]>();

  constructor(options: DividerOptions) {
    this.#options = options;
    this.#pool = options.pool ?? new Pool(options.migrationId);
    this.#pool.join(this.#group);
    this.#seal = new Seal(this.#pool.key, this.#pool.id);
    const { replicas, patienceMs = defaultPatienceMs } = options;
    const [pool, group] = [this.#pool, this.#group];
    const relays = new RelayEnds(options.relays, { group, onChange: () => this.#changed() });
    this.#relays = relays;
    this.#placer = new SlabPlacer(relays, replicas);
    this.#borrowing = new Borrowing({
      ...{ pool, group, relays, replicas, patienceMs },
      isEnded: () => this.#isEnded,
      onHeld: (slab, { parts, runs }, holders) => {
        this.#placed.set(slab, { runs: [], holders });
        this.#placedBytes += bytesOf(parts);
        this.#host?.tell(
          encodeSlab({ slab, parts, holders: [...holders], runs: [...runs], isBorrowed: true }),
        );
      },
      onFailed: (slab) => this.#giveBackSharers(slab),
      onOver: () => this.#host?.wake(),
    });
  }

  /** Opens a session with each relay, all at once; one that cannot be reached is done without. */
  async open(): Promise<void> {
    await this.#relays.open((relay) => this.#lose(relay));
  }

  /** The destination hears first of all what it needs to know of the relays. */
  begin(host: DividerHost): void {
    this.#host = host;
    this.#placer.begin();
    const { migrationId, replicas, pool } = this.#options;
    const relays = this.#relays.ids;
    const division: Division = {
      migrationId,
      ...(pool && { pool: pool.id }),
      key: this.#pool.key,
      group: this.#group,
      relays,
      replicas,
      partPages,
    };
    host.tell(encodeDivision(division));
  }

  /** Whether it takes another slab now. */
  get hasRoom(): boolean {
    const { slabs, bytes } = this.#inFlight;
    if (!this.#borrowing.hasRoom) return false;
    if (this.#making >= mostInTheMaking || slabs >= mostSlabsInFlight || bytes >= mostInFlightBytes)
      return false;
    // One that would only wait for its relays is not made yet.
    return typeof place(this.#relays.views(), typicalBytes, this.#options.replicas) !== 'string';
  }

  /** Whether there are enough relays at all. */
  get isUsable(): boolean {
    return place(this.#relays.views(), MiB, this.#options.replicas) !== 'none';
  }

  /** Every slab that it took is placed, or given back. */
  get isSettled(): boolean {
    return this.#inFlight.slabs === 0 && this.#borrowing.isSettled;
  }

  /** Slabs that are placed now. */
  get size(): number {
    return this.#placed.size;
  }

  /** `pages` are those that are given back if it cannot be placed. Nothing is placed when there is no content. */
  add(fill: (slab: number) => Promise<SlabContent | undefined>, pages: readonly Run[]): void {
    this.#inFlight.slabs += 1;
    // By the order in which they were read.
    const slab = this.#pool.begin(this.#group);
    this.#sharers.set(slab, []);
    this.#add(slab, fill(slab))
      .catch(() => {
        this.#host?.giveBack(pages);
        this.#giveBackSharers(slab);
      })
      .finally(() => {
        this.#inFlight.slabs -= 1;
        this.#host?.wake();
      });
  }

  /**
   * Where content with this digest is, if it is in a slab already. If not, it will be in this one, as this page.
   */
  like(digest: Buffer, slab: number, page: number): Content | undefined {
    const known = this.#pool.find(digest);
    if (known && (this.#sharers.has(known.slab) || this.#borrow(known.slab))) return known;
    this.#pool.note(digest, { slab, page });
    return undefined;
  }

  /** Whether it is a slab of another VM: then relays are asked to hold it for this one as well. */
  #borrow(slab: number): boolean {
    if (!this.#borrowing.begin(slab)) return false;
    this.#sharers.set(slab, []);
    return true;
  }

  addZeroes(runs: readonly Run[]): void {
    for (const [, count] of runs) this.#zeroPages += count;
    this.#host?.tell(encodeZeroes(runs));
  }

  /** Of these pages nothing is good that was added until now. */
  addStale(runs: Run[]): void {
    if (runs.length > 0) this.#host?.tell(encodeStale({ slab: this.#pool.nextSlab, runs }));
  }

  /** How fast relays take what is sent to them, all together. */
  get bytesPerSecond(): number {
    return this.#relays.bytesPerSecond;
  }

  /** For so long what is on its way to them keeps the uplink busy. */
  get queuedMs(): number {
    return this.#relays.queuedMs;
  }

  /** Of slabs that are placed, borrowed ones among them, each counted once. */
  get placedBytes(): number {
    return this.#placedBytes;
  }

  /** Sealed bytes that went to relays from here. */
  get sentBytes(): number {
    return this.#relays.sentBytes;
  }

  get statistics(): DivisionStatistics {
    const relays = this.#relays.statistics;
    const { replicas } = this.#options;
    return {
      replicas,
      slabs: this.#slabs,
      zeroPages: this.#zeroPages,
      alikePages: this.#alikePages,
      ...(this.#borrowedPages > 0 && { borrowedPages: this.#borrowedPages }),
      relays,
    };
  }

  /** Relays are to keep what they have as long as they ever do: the VM is about to leave. */
  prolong(): void {
    this.#relays.prolong();
  }

  /** All do that are here. */
  get isProlonged(): boolean {
    return this.#relays.isProlonged;
  }

  /** Lets go of the relays, which keep what they hold; or drops it there, when nobody will come for it. */
  end({ drop }: { drop: boolean }): void {
    this.#host = undefined;
    if (!this.#isEnded) this.#pool.leave(this.#group, { dropped: drop });
    this.#isEnded = true;
    this.#placer.end();
    this.#relays.end({ drop });
  }

  async #add(slab: number, content: Promise<SlabContent | undefined>): Promise<void> {
    this.#making += 1;
    const known = await content.finally(() => {
      this.#making -= 1;
      this.#host?.wake();
    });
    if (known) this.#addAlike(slab, known.alike);
    if (!known || known.parts.length === 0) {
      this.#forget(slab);
      return;
    }
    const { parts, runs } = known;
    const sealedParts = parts.map((part, number) => this.#seal.close(slab, number, part));
    const sealed = Buffer.concat(sealedParts);
    this.#inFlight.bytes += sealed.length;
    try {
      const holders = await this.#placer.place(slab, sealed);
      const placed = { runs, holders };
      this.#placed.set(slab, placed);
      // One of them may be lost already.
      if (this.#isThin(placed)) return this.#giveBack(slab);
      this.#slabs += 1;
      this.#placedBytes += sealed.length;
      this.#relays.count(holders, sealed.length);
      const lengths = sealedParts.map(({ length }) => length);
      this.#host?.tell(encodeSlab({ slab, parts: lengths, holders: [...holders], runs: [...runs] }));
      const relays = [...holders].map((holder) => this.#relays.idOf(holder));
      this.#pool.place(slab, { group: this.#group, parts: lengths, runs, relays });
    } finally {
      this.#inFlight.bytes -= sealed.length;
    }
  }

  /** Of what is alike to a slab that is lost the source takes care itself. */
  #addAlike(number: number, alike: readonly AlikePage[]): void {
    const pages = alike.filter(({ slab, page }) => {
      const sharers = this.#sharers.get(slab);
      if (sharers) sharers.push(page);
      else this.#host?.giveBack([[page, 1]]);
      return sharers !== undefined;
    });
    this.#alikePages += pages.length;
    this.#borrowedPages += pages.filter(({ slab }) => this.#borrowing.has(slab)).length;
    if (pages.length > 0) this.#host?.tell(encodeAlike({ number, pages }));
  }

  #giveBackSharers(slab: number): void {
    const pages = this.#sharers.get(slab);
    this.#forget(slab);
    if (pages && pages.length > 0) this.#host?.giveBack(pages.map((page): Run => [page, 1]));
  }

  /** Nothing is said to be like what is in it any more. */
  #forget(slab: number): void {
    this.#sharers.delete(slab);
    this.#pool.forget(slab, this.#group);
  }

  #isThin({ holders }: Placed): boolean {
    return this.#relays.aliveOf(holders) < this.#options.replicas;
  }

  /** What it held has one replica less: the source takes care of it again. */
  #lose(number: number): void {
    // When it has ended it is only the session that is over.
    for (const [slab, placed] of this.#isEnded ? [] : this.#placed)
      if (placed.holders.has(number) && this.#isThin(placed)) this.#giveBack(slab);
    this.#changed();
  }

  #giveBack(slab: number): void {
    const placed = this.#placed.get(slab);
    this.#placed.delete(slab);
    if (placed) this.#host?.giveBack(placed.runs);
    this.#giveBackSharers(slab);
  }

  #changed(): void {
    this.#placer.changed();
    this.#host?.wake();
  }
}
