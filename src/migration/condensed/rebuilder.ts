/**
 * Makes pages out of a batch, with what this end holds: reference sets, and what its QEMU has got so far. What it
 * makes is held against the digest of the batch, so nothing that either end believes wrongly reaches the guest.
 *
 * QEMU takes pages from a socket, and when is not known. So the last ones written are kept here; all older ones have
 * left the socket and are read from QEMU's memory.
 */
import { AppError } from '../../model/errors.ts';
import { MiB } from '../../model/units.ts';
import {
  type BlockReader,
  type BoundedReader,
  boundedReader,
  digestBytes,
  digestOf,
  inTime,
  type SetName,
} from '../../pages/index.ts';
import { pageBytes } from '../../stream/index.ts';
import { type ReadRun, readBatch } from './batch.ts';
import { unsqueeze } from './compression.ts';
import { agentError, batchPages } from './frames.ts';

/** More than what fits between us and QEMU: our buffers for it are 1 MiB, the kernel's half of that. */
const recentPages = (8 * MiB) / pageBytes;
const mostBodyBytes = batchPages * pageBytes + MiB;
/** A set whose storage takes longer for a batch costs more than it saves. */
const readTimeoutMs = 3000;
/**
 * A set that is involved in so many batches that come out wrong, and in no more that come out right, is not what the
 * source takes it for. Fewer say nothing: what a guest writes to its disk meanwhile lies together in its memory.
 */
const mostWrong = 8;
const headBytes = 5 + 2 * digestBytes;

/** Reads pages as QEMU has them now. */
export interface PageReader {
  read(page: number, count: number, to: Buffer, at?: number): void;
}

/** Consecutive pages with their content, or zero pages without. */
export interface PageRun {
  page: number;
  count: number;
  content: Buffer<ArrayBufferLike> | undefined;
}

export interface Rebuilt {
  runs: PageRun[];
  /** Pages that could not be made: the source must send them whole. */
  missed: number[];
  /** Numbers of sets that are of no use any more, told once. */
  lost: number[];
}

/** A batch that is sound, no more compressed. */
export interface Unpacked {
  bytes: Buffer;
  /** Of the pages that are to be made of references, one behind the other. */
  madeDigest: Buffer;
}

/** Throws for what no source sends, and for what is not what it sent. */
export async function unpack(body: Buffer): Promise<Unpacked> {
  if (body.length < headBytes) throw agentError('a batch without a head');
  const length = body.readUInt32BE(1);
  if (length > mostBodyBytes) throw agentError(`a batch of ${length} bytes`);
  // The rest of the body may be another one's when it is unpacked.
  const head = Buffer.from(body.subarray(0, headBytes));
  const bytes = await unsqueeze({ compressed: isSqueezed(body), bytes: body.subarray(headBytes) }, length);
  if (!digestOf(bytes).equals(head.subarray(5, 5 + digestBytes)))
    throw agentError('a batch whose digest is wrong');
  return { bytes, madeDigest: head.subarray(5 + digestBytes) };
}

/** Then it takes a while to unpack, and nothing of it is kept. */
export const isSqueezed = (body: Buffer): boolean => body[0] === 1;

/**
 * Opens a set that was offered, with a bound on all that it may take: what comes too late, or not at all, is as if the
 * set were gone, and what refers to it is asked for again.
 */
export async function openSet(
  name: SetName,
  openReader: (name: SetName) => Promise<BlockReader | undefined>,
  timeoutMs = readTimeoutMs,
): Promise<BoundedReader> {
  const reader = await inTime(openReader(name), timeoutMs).catch(() => undefined);
  return boundedReader(reader, timeoutMs);
}

export class Rebuilder {
  readonly #pages: number;
  readonly #sets: readonly BoundedReader[];
  /** By set, how many batches with it came out wrong, and how many right; and those that the source knows to be lost. */
  readonly #wrong: number[] = [];
  readonly #right: number[] = [];
  readonly #told = new Set<number>();
  readonly #memory: PageReader | undefined;
  /**
   * What is made, one batch behind the other, and again from the beginning when a batch does not fit any more: at
   * least the last `recentPages` pages are in it.
   */
  readonly #ring: Buffer<SharedArrayBuffer>;
  /** The place of the page's last content in the ring, from 1, counted through all turns of the ring. */
  readonly #lastPlace: Float64Array;
  /** How many places were given so far. */
  #places = 0;

  constructor(options: { pages: number; sets: readonly BoundedReader[]; memory: PageReader | undefined }) {
    this.#pages = options.pages;
    this.#sets = options.sets;
    this.#memory = options.memory;
    // Whoever cannot read back has nothing referred to.
    this.#lastPlace = new Float64Array(options.memory ? options.pages : 0);
    const ringPages = (options.memory ? recentPages : 0) + 2 * batchPages;
    this.#ring = Buffer.from(new SharedArrayBuffer(ringPages * pageBytes));
  }

  /** All content that is made lies in it, so that another thread may take it from there. */
  get made(): SharedArrayBuffer {
    return this.#ring.buffer;
  }

  /**
   * Batches must come in their order, one after the other. What is given is valid until so many more have come as fill
   * the ring.
   */
  async rebuild({ bytes, madeDigest }: Unpacked): Promise<Rebuilt> {
    const runs = readBatch(bytes, this.#pages);
    const references = countPages(runs.filter(isReference));
    const pages = references + countPages(runs.filter(({ kind }) => kind === 'literal'));
    const fromSets = await this.#readSets(runs);
    const first = this.#take(pages);
    const ring = this.#ring.subarray(first * pageBytes, (first + pages) * pageBytes);
    const result: PageRun[] = [];
    // References first, so that what their digest is over lies in one piece.
    let [madeAt, literalAt] = [0, references];
    let isWhole = fromSets !== undefined;
    for (const run of runs) {
      const { page, count, kind } = run;
      if (kind === 'zero') {
        result.push({ page, count, content: undefined });
        continue;
      }
      const at = kind === 'literal' ? literalAt : madeAt;
      const content = ring.subarray(at * pageBytes, (at + count) * pageBytes);
      const place = this.#places - pages + at;
      result.push({ page, count, content });
      if (kind === 'literal') {
        content.set(bytes.subarray(run.dataAt, run.dataAt + content.length));
        this.#note(page, count, place);
        literalAt += count;
        continue;
      }
      madeAt += count;
      if (kind !== 'set') isWhole = this.#fromMemory(run, bytes, content, place) && isWhole;
      else {
        fromSets?.get(run)?.copy(content);
        this.#note(page, count, place);
      }
    }
    const made = ring.subarray(0, references * pageBytes);
    if (references === 0 || (isWhole && digestOf(made).equals(madeDigest))) {
      for (const set of setsOf(runs)) this.#right[set] = (this.#right[set] ?? 0) + 1;
      return { runs: result, missed: [], lost: [] };
    }
    const missed = runs
      .filter(isReference)
      .flatMap(({ page, count }) => Array.from({ length: count }, (_, index) => page + index));
    const bad = new Set(missed);
    const lost = this.#blame(runs);
    return { runs: result.filter(({ page, content }) => !content || !bad.has(page)), missed, lost };
  }

  /** The sets that a batch which came out wrong refers to: gives those that are found to be lost by it. */
  #blame(runs: readonly ReadRun[]): number[] {
    const lost = setsOf(runs).filter((set) => {
      const wrong = (this.#wrong[set] ?? 0) + 1;
      this.#wrong[set] = wrong;
      return this.#sets[set]?.isLost || (wrong >= mostWrong && wrong >= (this.#right[set] ?? 0));
    });
    const fresh = lost.filter((set) => !this.#told.has(set));
    for (const set of fresh) this.#told.add(set);
    return fresh;
  }

  /** By run; `undefined` when a set does not give what it should have. */
  async #readSets(runs: readonly ReadRun[]): Promise<Map<ReadRun, Buffer> | undefined> {
    const contents = new Map<ReadRun, Buffer>();
    for (const [number, set] of this.#sets.entries()) {
      const of = runs.filter((run) => run.kind === 'set' && run.set === number);
      if (of.length === 0) continue;
      const blocks = of.flatMap(({ from, count }) =>
        Array.from({ length: count }, (_, index) => from + index),
      );
      try {
        const bytes = await set.read(Uint32Array.from(blocks));
        let at = 0;
        for (const run of of) {
          contents.set(run, bytes.subarray(at, at + run.count * pageBytes));
          at += run.count * pageBytes;
        }
      } catch (error) {
        if (!(error instanceof AppError)) throw error;
        return undefined;
      }
    }
    const isKnown = runs.every((run) => run.kind !== 'set' || contents.has(run));
    return isKnown ? contents : undefined;
  }

  /** Page by page: the next one of the run may be a copy of this one. */
  #fromMemory(run: ReadRun, bytes: Buffer, to: Buffer, place: number): boolean {
    try {
      for (let index = 0; index < run.count; index++) {
        const at = index * pageBytes;
        this.#current(run.kind === 'copy' ? run.from + index : run.page + index, to, at);
        if (run.kind === 'delta') xor(to, at, bytes, run.dataAt + at);
        this.#note(run.page + index, 1, place + index);
      }
      return true;
    } catch (error) {
      if (!(error instanceof AppError)) throw error;
      return false;
    }
  }

  #current(page: number, to: Buffer, at: number): void {
    const place = this.#lastPlace[page]! - 1;
    if (place >= 0 && place >= this.#places - recentPages) {
      const from = (place % this.#ringPages) * pageBytes;
      this.#ring.copy(to, at, from, from + pageBytes);
    } else if (this.#memory) this.#memory.read(page, 1, to, at);
    else throw new AppError('unsupported', `Page ${page} cannot be read back`);
  }

  get #ringPages(): number {
    return this.#ring.length / pageBytes;
  }

  /** Places for so many pages, one behind the other; gives where the first lies in the ring. */
  #take(pages: number): number {
    const left = this.#ringPages - (this.#places % this.#ringPages);
    if (pages > left) this.#places += left;
    const first = this.#places % this.#ringPages;
    this.#places += pages;
    return first;
  }

  #note(page: number, count: number, place: number): void {
    if (!this.#memory) return;
    for (let index = 0; index < count; index++) this.#lastPlace[page + index] = place + index + 1;
  }
}

const setsOf = (runs: readonly ReadRun[]): number[] => [
  ...new Set(runs.filter(({ kind }) => kind === 'set').map(({ set }) => set)),
];

const isReference = ({ kind }: ReadRun): boolean => kind !== 'zero' && kind !== 'literal';

const countPages = (runs: readonly ReadRun[]): number => runs.reduce((sum, { count }) => sum + count, 0);

function xor(to: Buffer, at: number, by: Buffer, byAt: number): void {
  for (let index = 0; index < pageBytes; index++) to[at + index]! ^= by[byAt + index]!;
}
