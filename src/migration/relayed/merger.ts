/**
 * At the destination: fetches from relays what the VM lacks. What the guest waits for goes first, then what lies behind
 * that, then everything else, no faster than it comes. A slab that does not come, or is not what was sealed, is fetched
 * from another relay that holds it.
 */

import type { Duplex } from 'node:stream';
import { AppError } from '../../model/errors.ts';
import type { MergeStatistics } from '../../model/migration.ts';
import { delay } from '../../qmp/index.ts';
import { RelayClient, Seal } from '../../relay/index.ts';
import type { PageSet } from '../condensed/page-set.ts';
import { partOf, type Run, rangeOf, type Slab, sealedFor } from './division.ts';
import type { Manifest } from './manifest.ts';
import { PullWindow } from './pull-window.ts';

export interface MergerOptions {
  manifest: Manifest;
  /** A session of the division's group with the relay of this number. */
  open: (relay: number) => Promise<Duplex>;
  /** What is not there yet, live. */
  missing: PageSet;
  /** Gives what a part of a slab contains to QEMU, as far as that is good and lacking there. */
  place: (body: Buffer, slab: number) => Promise<void>;
  placeZeroes: (runs: readonly Run[]) => Promise<void>;
  /** Nobody gives a slab that is needed: told once for each. It is tried again all the same. */
  onLost: (message: string) => void;
}

/** Parts `first` to `last` of a slab. */
interface Wish {
  slab: Slab;
  first: number;
  last: number;
  /** The guest waits for it. */
  urgent: boolean;
}

/** A relay that did not answer is asked last for so long. */
const restMs = 2000;
/** Between attempts to get what nobody gives. */
const retryMs = 2000;
const leastSlowMs = 1000;
const zeroPagesAtOnce = 256;
/** A guest that has asked for something lately is about to ask for more. */
const calmMs = 300;
const mostSamples = 4096;

interface End {
  client: Promise<RelayClient> | undefined;
  /** Of the last answers, smoothed. */
  latencyMs: number;
  restsUntil: number;
  inFlight: number;
}

export class Merger {
  readonly #options: MergerOptions;
  readonly #seal: Seal;
  readonly #ends: End[];
  readonly #abort = new AbortController();
  readonly #window = new PullWindow();
  readonly #lost = new Set<number>();
  readonly #statistics: MergeStatistics = { slabs: 0, bytes: 0, faults: 0, wrong: 0, refetched: 0 };
  readonly #faultMs: number[] = [];
  #urgent = 0;
  #wantedAt = Number.NEGATIVE_INFINITY;
  /** Slabs that are on their way because nothing else is to do. */
  readonly #pulled = new Set<Slab>();
  #next = 0;
  #nextZero = 0;
  #change = Promise.withResolvers<void>();

  constructor(options: MergerOptions) {
    this.#options = options;
    const { division } = options.manifest;
    const { key, relays } = division;
    this.#seal = new Seal(key, sealedFor(division));
    this.#ends = relays.map(() => ({ client: undefined, latencyMs: 0, restsUntil: 0, inFlight: 0 }));
    // What the guest asks for first would wait until there is a session.
    this.attach();
  }

  get statistics(): MergeStatistics {
    const sorted = this.#faultMs.toSorted((a, b) => a - b);
    const at = (share: number) => Math.round(sorted[Math.floor(sorted.length * share)]! * 10) / 10;
    return {
      ...this.#statistics,
      ...(sorted.length > 0 && { faultMedianMs: at(0.5), faultP95Ms: at(0.95) }),
    };
  }

  /** The guest waits for this page, which the manifest covers. */
  want(page: number): void {
    const { manifest, missing } = this.#options;
    if (!missing.has(page)) return;
    if (manifest.zeroes.has(page)) {
      void this.#options.placeZeroes([[page, 1]]).catch(() => {});
      return;
    }
    const { slab, page: there } = manifest.whereIs(page)!;
    const part = partOf(slab, there, manifest.division.partPages);
    const startedAt = performance.now();
    this.#wantedAt = startedAt;
    this.#urgent += 1;
    // The rest of it is next.
    this.#next = manifest.slabs.indexOf(slab);
    this.#statistics.faults += 1;
    this.#fetch({ slab, first: part, last: part, urgent: true })
      .then(
        () => {
          if (this.#faultMs.length < mostSamples) this.#faultMs.push(performance.now() - startedAt);
        },
        // Told already.
        () => {},
      )
      .finally(() => {
        this.#urgent -= 1;
        this.#changed();
      });
  }

  /** To all of them: a relay keeps what it holds as long as somebody is there for it. */
  attach(): void {
    for (const relay of this.#ends.keys()) this.#client(relay).catch(() => {});
  }

  /** Until nothing is missing any more. Only when every missing page is covered. */
  async run(): Promise<void> {
    const { missing } = this.#options;
    const { signal } = this.#abort;
    this.attach();
    while (missing.size > 0 && !signal.aborted) {
      const change = this.#change.promise;
      if (this.#urgent === 0) {
        const most = this.#isRestless && this.#window.isSlow ? 1 : this.#window.slabs;
        if (this.#pulled.size < most && this.#pull()) continue;
        if (await this.#pullZeroes()) continue;
      }
      if (missing.size > 0) await Promise.race([change, delay(retryMs, signal).catch(() => {})]);
    }
  }

  get #isRestless(): boolean {
    return performance.now() - this.#wantedAt < calmMs;
  }

  /** Nothing of it is needed any more: `drop` lets the relays forget it. */
  async end({ drop }: { drop: boolean }): Promise<void> {
    // Also those that were not asked for anything yet hold something.
    if (drop) await Promise.allSettled(this.#ends.map((_, relay) => this.#drop(relay)));
    this.#abort.abort();
    for (const { client } of this.#ends) client?.then((one) => one.close()).catch(() => {});
    this.#changed();
  }

  async #drop(relay: number): Promise<void> {
    (await this.#client(relay)).drop();
  }

  /** Begins with the next slab that is needed; false if there is none. */
  #pull(): boolean {
    const { slabs } = this.#options.manifest;
    for (let turn = 0; turn < slabs.length; turn++) {
      const slab = slabs[(this.#next + turn) % slabs.length]!;
      if (this.#pulled.has(slab) || this.#lost.has(slab.slab)) continue;
      const parts = this.#missingOf(slab);
      if (parts.length === 0) continue;
      const isPiece = this.#isRestless && this.#window.isSlow;
      const first = parts[0]!;
      const end = parts.at(-1)!;
      const last = isPiece ? lastInRow(parts, this.#window.partsBetween(slab.parts.length)) : end;
      // The rest of it is next.
      this.#next = this.#next + turn + (last === end ? 1 : 0);
      const wasAlone = this.#pulled.size === 0;
      this.#pulled.add(slab);
      const startedAt = performance.now();
      this.#fetch({ slab, first, last, urgent: false })
        .then(
          () => {
            if (last === end) this.#statistics.slabs += 1;
            // A piece says nothing of what a slab takes.
            if (!isPiece) this.#window.note(performance.now() - startedAt, wasAlone);
          },
          () => {},
        )
        .finally(() => {
          this.#pulled.delete(slab);
          this.#changed();
        });
      return true;
    }
    return false;
  }

  /** The parts of the slab that have something which is missing, in their order. */
  #missingOf(slab: Slab): number[] {
    const { manifest, missing } = this.#options;
    const { partPages } = manifest.division;
    const parts = new Set<number>();
    let before = 0;
    for (const [first, count] of slab.isBorrowed ? [] : slab.runs) {
      const end = first + count;
      for (let page = missing.next(first); page >= 0 && page < end; page = missing.next(page + 1))
        if (manifest.isGood(page, slab.slab)) parts.add(Math.floor((before + page - first) / partPages));
      before += count;
    }
    for (const [like, pages] of manifest.sharersOf(slab.slab))
      if (pages.some((page) => missing.has(page))) parts.add(partOf(slab, like, partPages));
    return [...parts].sort((a, b) => a - b);
  }

  async #pullZeroes(): Promise<boolean> {
    const { manifest, missing } = this.#options;
    const runs: Run[] = [];
    let pages = 0;
    for (let page = manifest.zeroes.next(this.#nextZero); page >= 0; page = manifest.zeroes.next(page + 1)) {
      this.#nextZero = page + 1;
      if (!missing.has(page)) continue;
      runs.push([page, 1]);
      pages += 1;
      if (pages >= zeroPagesAtOnce) break;
    }
    if (pages === 0) return false;
    await this.#options.placeZeroes(runs);
    return true;
  }

  /** Until it is placed, or all of this ends. */
  async #fetch(wish: Wish): Promise<void> {
    const { signal } = this.#abort;
    const { slab } = wish.slab;
    for (;;) {
      try {
        const bodies = await this.#obtain(wish);
        this.#lost.delete(slab);
        this.#statistics.bytes += rangeOf(wish.slab, wish.first, wish.last).length;
        for (const body of bodies) await this.#options.place(body, slab);
        return;
      } catch (error) {
        signal.throwIfAborted();
        if (!(error instanceof AppError)) throw error;
        if (!this.#lost.has(slab)) this.#options.onLost(error.message);
        this.#lost.add(slab);
        await delay(retryMs, signal);
      }
    }
  }

  /** From the holder that answers soonest; from the next as well when it fails or is slow. */
  async #obtain(wish: Wish): Promise<Buffer[]> {
    const holders = this.#inOrder(wish.slab.holders);
    const { promise, resolve, reject } = Promise.withResolvers<Buffer[]>();
    let begun = 0;
    let failed = 0;
    const begin = (): void => {
      const relay = holders[begun];
      if (relay === undefined) return;
      begun += 1;
      if (begun > 1) this.#statistics.refetched += 1;
      this.#attempt(relay, wish).then(resolve, (error) => {
        failed += 1;
        if (failed === holders.length) reject(error);
        else begin();
      });
    };
    begin();
    const timer = setInterval(begin, Math.max(leastSlowMs, this.#window.typicalMs * 4));
    try {
      return await promise;
    } finally {
      clearInterval(timer);
    }
  }

  /** The parts that are wanted, opened. */
  async #attempt(relay: number, { slab, first, last, urgent }: Wish): Promise<Buffer[]> {
    const end = this.#ends[relay]!;
    const startedAt = performance.now();
    const isAlone = this.#ends.every(({ inFlight }) => inFlight === 0);
    end.inFlight += 1;
    try {
      const client = await this.#client(relay);
      // Not what it takes to open a session.
      const askedAt = performance.now();
      const sealed = await client.get(slab.slab, { ...rangeOf(slab, first, last), urgent });
      if (!sealed)
        throw new AppError(
          'not_found',
          `Slab ${slab.slab} is not at relay ${relay + 1} of ${this.#ends.length}`,
        );
      const endedAt = performance.now();
      if (isAlone && client.leastRttMs !== undefined)
        this.#window.noteParts(last - first + 1, endedAt - askedAt - client.leastRttMs);
      let at = 0;
      const bodies = slab.parts.slice(first, last + 1).map((bytes, index) => {
        at += bytes;
        return this.#seal.open(slab.slab, first + index, sealed.subarray(at - bytes, at));
      });
      end.latencyMs += (endedAt - startedAt - end.latencyMs) / 4;
      return bodies;
    } catch (error) {
      if (error instanceof AppError && error.code === 'image_corrupt') this.#statistics.wrong += 1;
      end.restsUntil = performance.now() + restMs;
      throw error;
    } finally {
      end.inFlight -= 1;
    }
  }

  #inOrder(holders: readonly number[]): number[] {
    const now = performance.now();
    const key = (relay: number): number => {
      const { restsUntil, latencyMs, inFlight } = this.#ends[relay]!;
      return (restsUntil > now ? 1e9 : 0) + (latencyMs + 1) * (inFlight + 1);
    };
    return holders.toSorted((a, b) => key(a) - key(b));
  }

  async #client(relay: number): Promise<RelayClient> {
    const end = this.#ends[relay]!;
    end.client ??= this.#options.open(relay).then((session) => new RelayClient(session));
    const opening = end.client;
    try {
      const client = await opening;
      if (client.isAlive) return client;
      throw await client.gone;
    } catch (error) {
      if (end.client === opening) end.client = undefined;
      throw error;
    }
  }

  #changed(): void {
    this.#change.resolve();
    this.#change = Promise.withResolvers();
  }
}

/** The last of those that follow the first without a gap, `most` of them at the most. */
function lastInRow(parts: readonly number[], most: number): number {
  const first = parts[0]!;
  let count = 1;
  while (count < most && parts[count] === first + count) count += 1;
  return first + count - 1;
}
