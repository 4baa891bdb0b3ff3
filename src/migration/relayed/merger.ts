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
import type { Run, Slab } from './division.ts';
import type { Manifest } from './manifest.ts';
import { PullWindow } from './pull-window.ts';

export interface MergerOptions {
  manifest: Manifest;
  /** A session of the division's group with the relay of this number. */
  open: (relay: number) => Promise<Duplex>;
  /** What is not there yet, live. */
  missing: PageSet;
  /** Gives what a slab contains to QEMU, as far as it lacks it. */
  place: (body: Buffer) => Promise<void>;
  placeZeroes: (runs: readonly Run[]) => Promise<void>;
  /** Nobody gives a slab that is needed: told once for each. It is tried again all the same. */
  onLost: (message: string) => void;
}

/** A relay that did not answer is asked last for so long. */
const restMs = 2000;
/** Between attempts to get what nobody gives. */
const retryMs = 2000;
const leastSlowMs = 1000;
const zeroPagesAtOnce = 256;
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
  readonly #fetching = new Map<Slab, Promise<void>>();
  readonly #window = new PullWindow();
  readonly #lost = new Set<number>();
  readonly #statistics: MergeStatistics = { slabs: 0, bytes: 0, faults: 0, wrong: 0, refetched: 0 };
  readonly #faultMs: number[] = [];
  #urgent = 0;
  /** Slabs that are being pulled because nothing else is to do. */
  #pulling = 0;
  #next = 0;
  #nextZero = 0;
  #change = Promise.withResolvers<void>();

  constructor(options: MergerOptions) {
    this.#options = options;
    const { key, migrationId, relays } = options.manifest.division;
    this.#seal = new Seal(key, migrationId);
    this.#ends = relays.map(() => ({ client: undefined, latencyMs: 0, restsUntil: 0, inFlight: 0 }));
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
    const slab = manifest.slabOf(page)!;
    const startedAt = performance.now();
    this.#urgent += 1;
    this.#next = manifest.slabs.indexOf(slab) + 1;
    this.#statistics.faults += 1;
    this.#fetch(slab, true)
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

  /** Until nothing is missing any more. Only when every missing page is covered. */
  async run(): Promise<void> {
    const { missing } = this.#options;
    const { signal } = this.#abort;
    // All of them: a relay keeps what it holds as long as somebody is there for it.
    for (const relay of this.#ends.keys()) this.#client(relay).catch(() => {});
    while (missing.size > 0 && !signal.aborted) {
      const change = this.#change.promise;
      if (this.#urgent === 0) {
        if (this.#pulling < this.#window.slabs && this.#pull()) continue;
        if (await this.#pullZeroes()) continue;
      }
      if (missing.size > 0) await Promise.race([change, delay(retryMs, signal).catch(() => {})]);
    }
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
    const { manifest, missing } = this.#options;
    const { slabs } = manifest;
    const isNeeded = ({ runs }: Slab) =>
      runs.some(([first, count]) => {
        const page = missing.next(first);
        return page >= 0 && page < first + count;
      });
    for (let turn = 0; turn < slabs.length; turn++) {
      const slab = slabs[(this.#next + turn) % slabs.length]!;
      if (this.#fetching.has(slab) || this.#lost.has(slab.slab) || !isNeeded(slab)) continue;
      this.#next = this.#next + turn + 1;
      const wasAlone = this.#fetching.size === 0;
      this.#pulling += 1;
      const startedAt = performance.now();
      this.#fetch(slab, false)
        .then(
          () => this.#window.note(performance.now() - startedAt, wasAlone),
          () => {},
        )
        .finally(() => {
          this.#pulling -= 1;
          this.#changed();
        });
      return true;
    }
    return false;
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

  /** One fetch of a slab at a time, for whoever wants it. */
  #fetch(slab: Slab, urgent: boolean): Promise<void> {
    const known = this.#fetching.get(slab);
    if (known) return known;
    const fetched = this.#fetchAndPlace(slab, urgent).finally(() => this.#fetching.delete(slab));
    this.#fetching.set(slab, fetched);
    return fetched;
  }

  async #fetchAndPlace(slab: Slab, urgent: boolean): Promise<void> {
    const { signal } = this.#abort;
    for (;;) {
      try {
        const body = await this.#obtain(slab, urgent);
        this.#lost.delete(slab.slab);
        this.#statistics.slabs += 1;
        this.#statistics.bytes += slab.sealedBytes;
        await this.#options.place(body);
        return;
      } catch (error) {
        signal.throwIfAborted();
        if (!(error instanceof AppError)) throw error;
        if (!this.#lost.has(slab.slab)) this.#options.onLost(error.message);
        this.#lost.add(slab.slab);
        await delay(retryMs, signal);
      }
    }
  }

  /** From the holder that answers soonest; from the next as well when it fails or is slow. */
  async #obtain(slab: Slab, urgent: boolean): Promise<Buffer> {
    const holders = this.#inOrder(slab.holders);
    const { promise, resolve, reject } = Promise.withResolvers<Buffer>();
    let begun = 0;
    let failed = 0;
    const begin = (): void => {
      const relay = holders[begun];
      if (relay === undefined) return;
      begun += 1;
      if (begun > 1) this.#statistics.refetched += 1;
      this.#attempt(relay, slab, urgent).then(resolve, (error) => {
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

  async #attempt(relay: number, { slab, holders }: Slab, urgent: boolean): Promise<Buffer> {
    const end = this.#ends[relay]!;
    const startedAt = performance.now();
    end.inFlight += 1;
    try {
      const client = await this.#client(relay);
      const sealed = await client.get(slab, urgent);
      if (!sealed)
        throw new AppError('not_found', `Slab ${slab} is not at relay ${relay + 1} of ${holders.length}`);
      const body = this.#seal.open(slab, sealed);
      end.latencyMs += (performance.now() - startedAt - end.latencyMs) / 4;
      return body;
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
