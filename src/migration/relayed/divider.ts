/**
 * At the source: takes what the destination lacks, seals it and puts it on relays, and tells the destination where it
 * is. A slab counts as placed when as many relays as wanted say that they hold it; until then, and whenever one of them
 * is lost, its pages are the source's to give.
 */
import { randomBytes } from 'node:crypto';
import type { Duplex } from 'node:stream';
import { AppError } from '../../model/errors.ts';
import type { Uuid } from '../../model/ids.ts';
import type { DivisionStatistics } from '../../model/migration.ts';
import { MiB } from '../../model/units.ts';
import { keyBytes, newKey, RelayClient, Seal } from '../../relay/index.ts';
import { type Division, encodeDivision, encodeSlab, encodeZeroes, mostRelays, type Run } from './division.ts';
import { place, type RelayView } from './placement.ts';

export interface RelayEnd {
  id: Uuid;
  name: string;
  /** A session of the group with it. */
  open: (group: string) => Promise<Duplex>;
}

export interface DividerOptions {
  migrationId: Uuid;
  relays: readonly RelayEnd[];
  /** How many relays hold each slab. */
  replicas: number;
}

export interface SlabContent {
  /** Of each part the body of a batch that refers to nothing. */
  parts: readonly (readonly Uint8Array[])[];
  /** Its pages. */
  runs: readonly Run[];
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
/** A relay that has not answered by then gets company. */
const slowMs = 4000;

interface End extends RelayEnd {
  client: RelayClient | undefined;
  slabs: number;
}

interface Placed {
  runs: readonly Run[];
  holders: Set<number>;
}

export class Divider {
  readonly #options: DividerOptions;
  readonly #key = newKey();
  readonly #group = randomBytes(keyBytes).toString('hex');
  readonly #seal: Seal;
  readonly #ends: End[];
  readonly #placed = new Map<number, Placed>();
  #isEnded = false;
  #host: DividerHost | undefined;
  #nextSlab = 1;
  #inFlight = { slabs: 0, bytes: 0 };
  #change = Promise.withResolvers<void>();
  #slabs = 0;
  #placedBytes = 0;
  #zeroPages = 0;

  constructor(options: DividerOptions) {
    this.#options = options;
    this.#seal = new Seal(this.#key, options.migrationId);
    this.#ends = options.relays
      .slice(0, mostRelays)
      .map((relay) => ({ ...relay, client: undefined, slabs: 0 }));
  }

  /** Opens a session with each relay, all at once; one that cannot be reached is done without. */
  async open(): Promise<void> {
    await Promise.all(
      this.#ends.map(async (end, number) => {
        try {
          const client = new RelayClient(await end.open(this.#group));
          if (this.#isEnded) client.close();
          else end.client = client;
          void client.gone.then(() => this.#lose(number));
        } catch (error) {
          if (!(error instanceof AppError)) throw error;
        }
      }),
    );
  }

  /** The destination hears first of all what it needs to know of the relays. */
  begin(host: DividerHost): void {
    this.#host = host;
    const { migrationId, replicas } = this.#options;
    const relays = this.#ends.map(({ id }) => id);
    const division: Division = {
      migrationId,
      key: this.#key,
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
    return this.isUsable && slabs < mostSlabsInFlight && bytes < mostInFlightBytes;
  }

  /** Whether there are enough relays at all. */
  get isUsable(): boolean {
    const views = this.#views(new Set());
    return place(views, MiB, this.#options.replicas) !== 'none';
  }

  /** Every slab that it took is placed, or given back. */
  get isSettled(): boolean {
    return this.#inFlight.slabs === 0;
  }

  /** Slabs that are placed now. */
  get size(): number {
    return this.#placed.size;
  }

  /** `pages` are those that are given back if it cannot be placed. Nothing is placed when there is no content. */
  add(content: Promise<SlabContent | undefined>, pages: readonly Run[]): void {
    this.#inFlight.slabs += 1;
    this.#add(content)
      .catch(() => this.#host?.giveBack(pages))
      .finally(() => {
        this.#inFlight.slabs -= 1;
        this.#host?.wake();
      });
  }

  addZeroes(runs: readonly Run[]): void {
    for (const [, count] of runs) this.#zeroPages += count;
    this.#host!.tell(encodeZeroes(runs));
  }

  /** Of slabs that are placed, each counted once. */
  get placedBytes(): number {
    return this.#placedBytes;
  }

  /** Sealed bytes that relays were given, all together. */
  get sentBytes(): number {
    return this.#ends.reduce((sum, { client }) => sum + (client?.heldBytes ?? 0), 0);
  }

  get statistics(): DivisionStatistics {
    const relays = this.#ends.map(({ name, slabs, client }) => ({
      name,
      slabs,
      bytes: client?.heldBytes ?? 0,
    }));
    const { replicas } = this.#options;
    return { replicas, slabs: this.#slabs, zeroPages: this.#zeroPages, relays };
  }

  /** Lets go of the relays, which keep what they hold; or drops it there, when nobody will come for it. */
  end({ drop }: { drop: boolean }): void {
    this.#host = undefined;
    this.#isEnded = true;
    for (const { client } of this.#ends) {
      if (drop) client?.drop();
      client?.close();
    }
  }

  async #add(content: Promise<SlabContent | undefined>): Promise<void> {
    const known = await content;
    if (!known) return;
    const { parts, runs } = known;
    const slab = this.#nextSlab++;
    const sealedParts = parts.map((part, number) => this.#seal.close(slab, number, part));
    const sealed = Buffer.concat(sealedParts);
    this.#inFlight.bytes += sealed.length;
    try {
      const holders = await this.#place(slab, sealed);
      const placed = { runs, holders };
      this.#placed.set(slab, placed);
      // One of them may be lost already.
      if (this.#isThin(placed)) return this.#giveBack(slab);
      this.#slabs += 1;
      this.#placedBytes += sealed.length;
      for (const holder of holders) this.#ends[holder]!.slabs += 1;
      this.#host?.tell(
        encodeSlab({
          slab,
          parts: sealedParts.map(({ length }) => length),
          holders: [...holders],
          runs: [...runs],
        }),
      );
    } finally {
      this.#inFlight.bytes -= sealed.length;
    }
  }

  /** Rejects when there are not enough relays that take it. */
  async #place(slab: number, sealed: Buffer): Promise<Set<number>> {
    const { replicas } = this.#options;
    const holders = new Set<number>();
    const asked = new Set<number>();
    const pending = new Set<number>();
    let patientUntil = 0;
    while (holders.size < replicas) {
      const lacking = replicas - holders.size - pending.size;
      if (lacking > 0) {
        const placement = place(this.#views(asked), sealed.length, lacking);
        if (placement === 'none') throw new AppError('peer_unreachable', `No relay takes slab ${slab}`);
        for (const number of placement === 'wait' ? [] : placement.relays) {
          asked.add(number);
          pending.add(number);
          patientUntil = performance.now() + slowMs;
          const put = this.#ends[number]!.client!.put(slab, sealed);
          put
            .then(
              (isHeld) => isHeld && holders.add(number),
              () => {},
            )
            .finally(() => {
              pending.delete(number);
              this.#changed();
            });
        }
      }
      await this.#changeWithin(slowMs);
      if (pending.size === 0 || performance.now() < patientUntil) continue;
      // One of them gets company, and whoever answers first counts.
      const more = place(this.#views(asked), sealed.length, 1);
      if (typeof more !== 'string') for (const number of pending) if (pending.delete(number)) break;
    }
    return holders;
  }

  #views(asked: ReadonlySet<number>): RelayView[] {
    return this.#ends.map(({ client }, number) => ({
      canBeAsked: client?.isAlive === true && !asked.has(number),
      freeBytes: client?.freeBytes ?? 0,
      inFlightBytes: client?.inFlightBytes ?? 0,
      bytesPerSecond: client?.bytesPerSecond,
    }));
  }

  #isThin({ holders }: Placed): boolean {
    const alive = [...holders].filter((holder) => this.#ends[holder]!.client?.isAlive);
    return alive.length < this.#options.replicas;
  }

  /** What it held has one replica less: the source takes care of it again. */
  #lose(number: number): void {
    for (const [slab, placed] of this.#placed)
      if (placed.holders.has(number) && this.#isThin(placed)) this.#giveBack(slab);
    this.#changed();
    this.#host?.wake();
  }

  #giveBack(slab: number): void {
    const placed = this.#placed.get(slab);
    this.#placed.delete(slab);
    if (placed) this.#host?.giveBack(placed.runs);
  }

  #changed(): void {
    this.#change.resolve();
    this.#change = Promise.withResolvers();
    this.#host?.wake();
  }

  /** Resolves when something changed, or after so long. */
  async #changeWithin(ms: number): Promise<void> {
    const late = Promise.withResolvers<void>();
    const timer = setTimeout(late.resolve, ms);
    try {
      await Promise.race([this.#change.promise, late.promise]);
    } finally {
      clearTimeout(timer);
    }
  }
}
