/**
 * At the destination: what of the VM's memory comes from relays. The source says of more and more of what is missing where
 * it is; when that is known of all of it and written down, nothing depends on the source any more, and a merger fetches it.
 */
import type { Duplex } from 'node:stream';
import type { Uuid } from '../../model/ids.ts';
import type { MergeStatistics } from '../../model/migration.ts';
import { pageBytes } from '../../stream/index.ts';
import { agentError, frame } from '../condensed/frames.ts';
import { PageSet } from '../condensed/page-set.ts';
import { type PageRun, Rebuilder, type Rebuilt, type Unpacked, unpack } from '../condensed/rebuilder.ts';
import {
  mostPages,
  parseAlike,
  parseBorrowed,
  parseRuns,
  parseSlab,
  parseStale,
  type Run,
} from './division.ts';
import type { Manifest } from './manifest.ts';
import { Merger } from './merger.ts';

/** What the destination of a relayed migration needs beside the link. */
export interface Merging {
  /** What an earlier agent knew of the relays: the source is not needed, and there is no link. */
  manifest?: Manifest | undefined;
  /** A session of the group with a relay. */
  openRelay: (id: Uuid, group: string) => Promise<Duplex>;
  /** Where everything is that is missing; when this resolves, it outlives the daemon. */
  keep: (manifest: Manifest, whole?: WholeStream) => Promise<void>;
  /**
   * Somebody else is to be able to go on with the VM: it counts as divided when all of its pages are with relays, and
   * `keep` gets what QEMU is to be told besides.
   */
  wantsWhole?: boolean;
  /** It is kept: the source is not needed any more. */
  onDivided: () => void;
  onLost: (message: string) => void;
}

/** What a QEMU is to be told before and after the pages, to have the VM as it left the source. */
export interface WholeStream {
  opening: Buffer;
  tail: Buffer;
}

export interface MemoryMergingOptions {
  merging: Merging;
  manifest: Manifest;
  /** Pages that are yet to come, and those that QEMU has asked for. */
  missing: PageSet;
  asked: PageSet;
  rebuilder: Rebuilder;
  /** Gives QEMU what was made, or zeroes; to be called in its turn. */
  place: (rebuilt: Rebuilt) => Promise<void>;
  placeZeroes: (runs: readonly Run[]) => Promise<void>;
  inTurn: (work: () => Promise<void>) => Promise<void>;
  /** Undefined for an agent that goes on for another, and has not heard all of it. */
  wholeStream: () => WholeStream | undefined;
  /** QEMU has got all that it needs. */
  isDone: () => boolean;
  onBroken: (error: unknown) => void;
}

export class MemoryMerging {
  readonly #options: MemoryMergingOptions;
  readonly #merger: Merger;
  /** Of slabs with pages of another VM. */
  #borrowing: Rebuilder | undefined;
  /** Settles when the merger has nothing to do any more. */
  #merged: Promise<void> | undefined;
  /** The source has nothing more to tell. */
  #isDividedThere = false;
  #isKeeping = false;
  #isDivided = false;

  constructor(options: MemoryMergingOptions) {
    this.#options = options;
    const { merging, manifest, missing, inTurn, placeZeroes } = options;
    const { relays, group } = manifest.division;
    this.#merger = new Merger({
      manifest,
      open: (relay) => merging.openRelay(relays[relay]!, group),
      missing,
      place: async (body, slab) => {
        const unpacked = await unpack(body);
        await inTurn(() => this.#takeSlab(unpacked, slab));
      },
      placeZeroes: (runs) => inTurn(() => placeZeroes(runs)),
      onLost: merging.onLost,
    });
  }

  get statistics(): MergeStatistics {
    return this.#merger.statistics;
  }

  /** Nothing depends on the source any more. */
  get isDivided(): boolean {
    return this.#isDivided;
  }

  /** Resolves when everything is here that came from relays. */
  get merged(): Promise<void> | undefined {
    return this.#merged;
  }

  /** QEMU waits for this page. Whether relays have it. */
  want(page: number): boolean {
    if (!this.#options.manifest.covers(page)) return false;
    this.#merger.want(page);
    return true;
  }

  /** A frame that tells of slabs. */
  learn(type: number, body: Buffer): void {
    const { manifest } = this.#options;
    const { pages } = manifest.layout.table;
    if (type === frame.slab) manifest.add(parseSlab(body, pages, manifest.division));
    else if (type === frame.borrowed) manifest.add(parseBorrowed(body, manifest.division));
    else if (type === frame.zeroes) manifest.addZeroes(parseRuns(body, pages));
    else if (type === frame.alike) manifest.addAlike(parseAlike(body, pages));
    else if (type === frame.stale) manifest.addStale(parseStale(body, pages));
    else if (type === frame.divided) this.#isDividedThere = true;
    else throw agentError(`a frame of type ${type} out of place`);
  }

  /** While the VM runs. What is still on its way from the source, or is to be mended by it, is waited for. */
  async perhapsDivided(): Promise<void> {
    const { manifest, missing, merging } = this.#options;
    if (!this.#isDividedThere || this.#isDivided || this.#isKeeping) return;
    if (manifest.firstUncovered(missing) >= 0) return;
    if (merging.wantsWhole) return this.#depositWhole();
    this.#isKeeping = true;
    await merging.keep(manifest);
    this.#isDivided = true;
    merging.onDivided();
    this.#start();
  }

  /** Goes on from a manifest, without the source. */
  goOn(): void {
    const { manifest, missing } = this.#options;
    const lost = manifest.firstUncovered(missing);
    if (lost >= 0) throw agentError(`a manifest without page ${lost}`);
    this.#isDivided = true;
    this.#start();
  }

  /** With `drop` relays may forget all of it. */
  async end(options: { drop: boolean }): Promise<void> {
    await this.#merger.end(options);
  }

  /** Whoever it is left with may be long in answering: the VM becomes whole meanwhile. */
  #depositWhole(): void {
    const { manifest, merging, wholeStream, isDone, onBroken } = this.#options;
    const whole = wholeStream();
    const all = new PageSet(manifest.layout.table.pages);
    all.addRange(0, manifest.layout.table.pages);
    if (!whole || manifest.firstUncovered(all) >= 0) return;
    this.#isKeeping = true;
    this.#start();
    merging.keep(manifest, whole).then(() => {
      if (isDone()) return;
      this.#isDivided = true;
      merging.onDivided();
    }, onBroken);
  }

  /** What the guest has asked for at the source comes from relays now as well; then everything else. */
  #start(): void {
    const { asked } = this.#options;
    for (let page = asked.next(0); page >= 0; page = asked.next(page + 1)) this.#merger.want(page);
    this.#merged = this.#merger.run();
    this.#merged.catch(() => {});
  }

  /** What is in a part of a slab, for all pages that it is good for. */
  async #takeSlab(batch: Unpacked, slab: number): Promise<void> {
    const { manifest, rebuilder, place } = this.#options;
    const isBorrowed = manifest.isBorrowed(slab);
    if (isBorrowed) this.#borrowing ??= new Rebuilder({ pages: mostPages, sets: [], memory: undefined });
    const rebuilt = await (isBorrowed ? this.#borrowing! : rebuilder).rebuild(batch);
    if (isBorrowed && rebuilt.missed.length > 0) throw agentError(`slab ${slab} with references`);
    const pagesOf = (page: number) => manifest.pagesOf(slab, page);
    await place({ ...rebuilt, runs: rebuilt.runs.flatMap((run) => spread(run, pagesOf)) });
  }
}

/** The content of each page of a run, for all pages that have it. */
function spread({ page, count, content }: PageRun, pagesOf: (page: number) => number[]): PageRun[] {
  return Array.from({ length: count }, (_, index) => {
    const part = content?.subarray(index * pageBytes, (index + 1) * pageBytes);
    return pagesOf(page + index).map((each) => ({ page: each, count: 1, content: part }));
  }).flat();
}
