/**
 * At the source: takes what the destination lacks, seals it and puts it on relays, and tells the destination where it
 * is. A slab counts as placed when as many relays as wanted say that they hold it; until then, and whenever one of them
 * is lost, its pages are the source's to give.
 *
 * A slab leaves once: the relay that has it gives it on to others, each of which says to the source itself that it has
 * come, and is what was sent. Where that takes long, the source sends it again.
 *
 * A slab of another VM of its pool is *borrowed*: relays that hold it hold it for this one as well, and say so to this one.
 * From then on it is as a slab of its own, but that nothing of it had to leave.
 */
import { hash, randomBytes } from 'node:crypto';
import type { Duplex } from 'node:stream';
import { AppError } from '../../model/errors.ts';
import type { Uuid } from '../../model/ids.ts';
import type { DivisionStatistics } from '../../model/migration.ts';
import { KiB, MiB } from '../../model/units.ts';
import { keyBytes, RelayClient, Seal } from '../../relay/index.ts';
import {
  type AlikePage,
  bytesOf,
  type Division,
  encodeAlike,
  encodeDivision,
  encodeSlab,
  encodeStale,
  encodeZeroes,
  mostRelays,
  type Run,
} from './division.ts';
import { passingWindowOf, place, type RelayView } from './placement.ts';
import { type Content, Pool, type PooledSlab } from './pool.ts';

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
/** A relay that has not answered by then gets company. */
const slowMs = 4000;
/** While nothing else leaves, a replica that another relay is to make is waited for no longer than this. */
const idleMs = 250;
const tickMs = 50;
const defaultPatienceMs = 15_000;
/** A relay that has not heard by then that it is to keep what it has counts as lost. */
const prolongMs = 60_000;
/** Slabs of other VMs that it waits for. */
const mostBorrowing = 512;

interface End extends RelayEnd {
  client: RelayClient | undefined;
  slabs: number;
  bytes: number;
  /** Of slabs that it has, and is to give on to other relays. */
  passingBytes: number;
  /** It keeps what it has, though nobody may come for it for long. */
  isProlonged: boolean;
}

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
  readonly #ends: End[];
  readonly #placed = new Map<number, Placed>();
  #isEnded = false;
  #isProlonging = false;
  #host: DividerHost | undefined;
  #inFlight = { slabs: 0, bytes: 0 };
  #making = 0;
  #change = Promise.withResolvers<void>();
  #slabs = 0;
  #placedBytes = 0;
  #zeroPages = 0;
  #alikePages = 0;
  #borrowedPages = 0;
  /** Of slabs that are placed, or are to be: pages that were said to be like theirs. */
  readonly #sharers = new Map<number, number[]>();
  /** Slabs of other VMs that relays were asked to hold for this one as well: once, whatever came of it. */
  readonly #borrowed = new Set<number>();
  #borrowing = 0;
  /** Replicas that other relays are to make. */
  readonly #passes = new Set<{ since: number; giveUp: () => void }>();
  /** When something was on its way from here to a relay last. */
  #busyAt = 0;
  #timer: NodeJS.Timeout | undefined;

  constructor(options: DividerOptions) {
    this.#options = options;
    this.#pool = options.pool ?? new Pool(options.migrationId);
    this.#pool.join(this.#group);
    this.#seal = new Seal(this.#pool.key, this.#pool.id);
    this.#ends = options.relays.slice(0, mostRelays).map((relay) => ({
      ...relay,
      client: undefined,
      slabs: 0,
      bytes: 0,
      passingBytes: 0,
      isProlonged: false,
    }));
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
    this.#timer ??= setInterval(() => this.#hurry(), tickMs);
    const { migrationId, replicas, pool } = this.#options;
    const relays = this.#ends.map(({ id }) => id);
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
    if (this.#borrowing >= mostBorrowing) return false;
    if (this.#making >= mostInTheMaking || slabs >= mostSlabsInFlight || bytes >= mostInFlightBytes)
      return false;
    // One that would only wait for its relays is not made yet.
    return typeof place(this.#views(new Set()), typicalBytes, this.#options.replicas) !== 'string';
  }

  /** Whether there are enough relays at all. */
  get isUsable(): boolean {
    const views = this.#views(new Set());
    return place(views, MiB, this.#options.replicas) !== 'none';
  }

  /** Every slab that it took is placed, or given back. */
  get isSettled(): boolean {
    return this.#inFlight.slabs === 0 && this.#borrowing === 0;
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
    if (this.#borrowed.has(slab) || !this.#canBorrow) return false;
    const placed = this.#pool.ofOthers(slab, this.#group);
    if (!placed) return false;
    this.#borrowed.add(slab);
    this.#sharers.set(slab, []);
    this.#borrowing += 1;
    this.#takeShare(slab, placed)
      .catch(() => false)
      .then((isHeld) => {
        if (!isHeld) this.#giveBackSharers(slab);
      })
      .finally(() => {
        this.#borrowing -= 1;
        this.#host?.wake();
      });
    return true;
  }

  /** Older relays know nothing of slabs that are shared. */
  get #canBorrow(): boolean {
    return this.#ends.filter(mayShare).length >= this.#options.replicas;
  }

  /** Whether as many relays as wanted hold it for this VM now. */
  async #takeShare(slab: number, placing: Promise<PooledSlab | undefined>): Promise<boolean> {
    const { replicas, patienceMs = defaultPatienceMs } = this.#options;
    const pooled = await within(patienceMs, placing);
    if (!pooled || this.#isEnded) return false;
    const asked = [...this.#ends.entries()].filter(
      ([, end]) => mayShare(end) && pooled.relays.includes(end.id),
    );
    if (asked.length < replicas) return false;
    const holders = new Set<number>();
    await Promise.all(
      asked.map(async ([number, { client }]) => {
        const sharing = client!.share(slab, pooled.group).catch(() => false);
        if (await within(slowMs, sharing)) holders.add(number);
      }),
    );
    const placed: Placed = { runs: [], holders };
    if (this.#isThin(placed)) {
      this.#pool.lose(slab);
      return false;
    }
    this.#placed.set(slab, placed);
    const { parts, runs } = pooled;
    this.#placedBytes += bytesOf(parts);
    this.#host?.tell(encodeSlab({ slab, parts, holders: [...holders], runs: [...runs], isBorrowed: true }));
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
    return this.#ends.reduce((sum, { client }) => sum + (client?.bytesPerSecond ?? 0), 0);
  }

  /** Of slabs that are placed, borrowed ones among them, each counted once. */
  get placedBytes(): number {
    return this.#placedBytes;
  }

  /** Sealed bytes that went to relays from here. */
  get sentBytes(): number {
    return this.#ends.reduce((sum, { client }) => sum + (client?.sentBytes ?? 0), 0);
  }

  get statistics(): DivisionStatistics {
    const relays = this.#ends.map(({ name, slabs, bytes }) => ({ name, slabs, bytes }));
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
    if (this.#isProlonging) return;
    this.#isProlonging = true;
    for (const end of this.#ends) void this.#prolong(end);
  }

  /** All do that are here. */
  get isProlonged(): boolean {
    return this.#ends.every(({ client, isProlonged }) => isProlonged || !client?.isAlive);
  }

  async #prolong(end: End): Promise<void> {
    const keeping = end.client?.prolong().then(
      () => true,
      () => false,
    );
    end.isProlonged = (await within(prolongMs, keeping ?? Promise.resolve(false))) === true;
    if (end.isProlonged) this.#changed();
    else end.client?.close();
  }

  /** Lets go of the relays, which keep what they hold; or drops it there, when nobody will come for it. */
  end({ drop }: { drop: boolean }): void {
    this.#host = undefined;
    if (!this.#isEnded) this.#pool.leave(this.#group, { dropped: drop });
    this.#isEnded = true;
    clearInterval(this.#timer);
    for (const { client } of this.#ends) {
      if (drop) client?.drop();
      client?.close();
    }
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
      const holders = await this.#place(slab, sealed);
      const placed = { runs, holders };
      this.#placed.set(slab, placed);
      // One of them may be lost already.
      if (this.#isThin(placed)) return this.#giveBack(slab);
      this.#slabs += 1;
      this.#placedBytes += sealed.length;
      for (const holder of holders) {
        this.#ends[holder]!.slabs += 1;
        this.#ends[holder]!.bytes += sealed.length;
      }
      const lengths = sealedParts.map(({ length }) => length);
      this.#host?.tell(encodeSlab({ slab, parts: lengths, holders: [...holders], runs: [...runs] }));
      const relays = [...holders].map((holder) => this.#ends[holder]!.id);
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
    this.#borrowedPages += pages.filter(({ slab }) => this.#borrowed.has(slab)).length;
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

  /** Rejects when there are not enough relays that take it. */
  async #place(slab: number, sealed: Buffer): Promise<Set<number>> {
    const { replicas } = this.#options;
    const holders = new Set<number>();
    const asked = new Set<number>();
    const pending = new Set<number>();
    /** Those that have it from here, or are to have: whether they have taken it. */
    const givers = new Map<number, Promise<boolean>>();
    let patientUntil = 0;
    const begin = (relay: number): void => {
      asked.add(relay);
      pending.add(relay);
      patientUntil = performance.now() + slowMs + this.queuedMs;
      const giver = [...givers].find(([each]) => this.#canPass(each));
      const giving = giver ? this.#pass(giver, relay, slab, sealed) : this.#put(relay, slab, sealed);
      if (!giver) givers.set(relay, giving);
      giving
        .then(
          (isHeld) => isHeld && holders.add(relay),
          () => {},
        )
        .finally(() => {
          pending.delete(relay);
          this.#changed();
        });
    };
    while (holders.size < replicas) {
      const lacking = replicas - holders.size - pending.size;
      if (lacking > 0) {
        const placement = place(this.#views(asked), sealed.length, lacking);
        if (placement === 'none') throw new AppError('peer_unreachable', `No relay takes slab ${slab}`);
        for (const relay of placement === 'wait' ? [] : placement.relays) begin(relay);
      }
      await this.#changeWithin(slowMs);
      if (pending.size === 0 || performance.now() < patientUntil) continue;
      // One of them gets company, and whoever answers first counts.
      const more = place(this.#views(asked), sealed.length, 1);
      if (typeof more !== 'string') for (const relay of pending) if (pending.delete(relay)) break;
    }
    return holders;
  }

  async #put(relay: number, slab: number, sealed: Buffer): Promise<boolean> {
    try {
      return await this.#ends[relay]!.client!.put(slab, sealed);
    } finally {
      this.#busyAt = performance.now();
    }
  }

  /** Unless it has much to give on as it is. */
  #canPass(relay: number): boolean {
    const { client, passingBytes } = this.#ends[relay]!;
    return client?.isAlive === true && passingBytes < passingWindowOf(client.passedPerSecond);
  }

  /** By way of another relay, which is told in one flight with the slab; from here when that fails, or takes long. */
  async #pass(
    [giver, isTaken]: readonly [number, Promise<boolean>],
    relay: number,
    slab: number,
    sealed: Buffer,
  ): Promise<boolean> {
    const [from, to] = [this.#ends[giver]!, this.#ends[relay]!];
    const late = Promise.withResolvers<false>();
    const giveUp = () => late.resolve(false);
    // Before it is there it waits for the uplink, as it would again if it was sent again.
    const pass = { since: Number.POSITIVE_INFINITY, giveUp };
    isTaken.then((has) => {
      if (has) pass.since = performance.now();
      else giveUp();
    }, giveUp);
    this.#passes.add(pass);
    try {
      const digest = hash('sha256', sealed, 'buffer');
      const isThere = to.client!.expect(slab, digest, sealed.length);
      const isPassed = from.client!.pass(slab, to.id, sealed.length);
      this.#countPassing(from, sealed.length, isTaken, isPassed);
      const isArrived = isPassed.then(
        (isTakenThere) => isTakenThere && isThere,
        () => false,
      );
      // The relay itself says what it has.
      if (await Promise.race([isThere, isArrived, late.promise])) return true;
    } finally {
      this.#passes.delete(pass);
    }
    return this.#put(relay, slab, sealed);
  }

  #countPassing(from: End, bytes: number, isTaken: Promise<boolean>, isPassed: Promise<boolean>): void {
    let isOver = false;
    const over = () => {
      isOver = true;
    };
    isPassed.then(over, over);
    isTaken
      .then(async (has) => {
        if (!has || isOver) return;
        from.passingBytes += bytes;
        await isPassed.finally(() => {
          from.passingBytes -= bytes;
        });
      })
      .catch(() => {});
  }

  /** While nothing leaves the source, it may as well send what others are late with. */
  #hurry(): void {
    const now = performance.now();
    if (this.#ends.some(({ client }) => (client?.inFlightBytes ?? 0) > 0)) this.#busyAt = now;
    const patienceMs = now - this.#busyAt > idleMs ? idleMs : slowMs;
    for (const { since, giveUp } of this.#passes) if (now - since > patienceMs) giveUp();
  }

  /** For so long what is on its way from here keeps the uplink busy, which other VMs may use as well. */
  get queuedMs(): number {
    const bytes = this.#ends.reduce((sum, { client }) => sum + (client?.inFlightBytes ?? 0), 0);
    return this.bytesPerSecond === 0 ? 0 : (bytes * 1000) / this.bytesPerSecond;
  }

  #views(asked: ReadonlySet<number>): RelayView[] {
    return this.#ends.map(({ client }, number) => ({
      canBeAsked: client?.isAlive === true && !asked.has(number),
      freeBytes: client?.freeBytes ?? 0,
      inFlightBytes: client?.inFlightBytes ?? 0,
      expectedBytes: client?.expectedBytes ?? 0,
      bytesPerSecond: client?.bytesPerSecond,
    }));
  }

  #isThin({ holders }: Placed): boolean {
    const alive = [...holders].filter((holder) => this.#ends[holder]!.client?.isAlive);
    return alive.length < this.#options.replicas;
  }

  /** What it held has one replica less: the source takes care of it again. */
  #lose(number: number): void {
    // When it has ended it is only the session that is over.
    for (const [slab, placed] of this.#isEnded ? [] : this.#placed)
      if (placed.holders.has(number) && this.#isThin(placed)) this.#giveBack(slab);
    this.#changed();
    this.#host?.wake();
  }

  #giveBack(slab: number): void {
    const placed = this.#placed.get(slab);
    this.#placed.delete(slab);
    if (placed) this.#host?.giveBack(placed.runs);
    this.#giveBackSharers(slab);
  }

  #changed(): void {
    this.#change.resolve();
    this.#change = Promise.withResolvers();
    this.#host?.wake();
  }

  /** Resolves when something changed, or after so long. */
  #changeWithin(ms: number): Promise<void> {
    return within(ms, this.#change.promise);
  }
}

/** As far as is known. */
const mayShare = ({ client }: End): boolean => client?.isAlive === true && client.canShare !== false;

/** What it resolves with, or nothing after so long. */
async function within<T>(ms: number, promise: Promise<T>): Promise<T | undefined> {
  const late = Promise.withResolvers<undefined>();
  const timer = setTimeout(late.resolve, ms, undefined);
  try {
    return await Promise.race([promise, late.promise]);
  } finally {
    clearTimeout(timer);
  }
}
