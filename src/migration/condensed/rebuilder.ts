/**
 * Makes pages out of a batch, with what this end holds: reference sets, and what its QEMU has got so far. What it
 * makes is held against the digest of the batch, so nothing that either end believes wrongly reaches the guest.
 *
 * QEMU takes pages from a socket, and when is not known. So the last ones written are kept here; all older ones have
 * left the socket and are read from QEMU's memory.
 */
import { AppError } from '../../model/errors.ts';
import { MiB } from '../../model/units.ts';
import { type BlockReader, digestBlocks, digestBytes, digestOf } from '../../pages/index.ts';
import { pageBytes } from '../../stream/index.ts';
import { type ReadRun, readBatch } from './batch.ts';
import { unsqueeze } from './compression.ts';
import { agentError, batchPages } from './frames.ts';

/** More than what fits between us and QEMU: our buffers for it are 1 MiB, the kernel's half of that. */
const recentPages = (8 * MiB) / pageBytes;
const mostBodyBytes = batchPages * pageBytes + MiB;

/** Reads pages as QEMU has them now. */
export interface PageReader {
  read(page: number, count: number, to: Buffer, at?: number): void;
}

/** Consecutive pages with their content, or zero pages without. */
export interface PageRun {
  page: number;
  count: number;
  content: Buffer | undefined;
}

export interface Rebuilt {
  runs: PageRun[];
  /** Pages that could not be made: the source must send them whole. */
  missed: number[];
}

/** In the place of a set that was offered and is gone: what refers to it is asked for again. */
export const lostSet: BlockReader = {
  blockCount: 0,
  read: () => Promise.reject(new AppError('image_corrupt', 'The reference set is not there any more')),
  [Symbol.asyncDispose]: () => Promise.resolve(),
};

export class Rebuilder {
  readonly #pages: number;
  readonly #sets: readonly BlockReader[];
  readonly #memory: PageReader | undefined;
  readonly #recent = Buffer.alloc(recentPages * pageBytes);
  /** The number of the page's last write, from 1. */
  readonly #lastWrite: Float64Array;
  #writes = 0;

  constructor(options: { pages: number; sets: readonly BlockReader[]; memory: PageReader | undefined }) {
    this.#pages = options.pages;
    this.#sets = options.sets;
    this.#memory = options.memory;
    // Whoever cannot read back has nothing referred to.
    this.#lastWrite = new Float64Array(options.memory ? options.pages : 0);
  }

  /** Batches must come in their order, one after the other. */
  async rebuild(body: Buffer): Promise<Rebuilt> {
    if (body.length < 5 + digestBytes) throw agentError('a batch without a head');
    const digest = Buffer.from(body.subarray(5, 5 + digestBytes));
    const bodyBytes = body.readUInt32BE(1);
    if (bodyBytes > mostBodyBytes) throw agentError(`a batch of ${bodyBytes} bytes`);
    const squeezed = { compressed: body[0] === 1, bytes: body.subarray(5 + digestBytes) };
    const bytes = await unsqueeze(squeezed, bodyBytes);
    const runs = readBatch(bytes, this.#pages);
    const isReference = ({ kind }: ReadRun) => kind !== 'zero' && kind !== 'literal';
    const references = runs.filter(isReference).reduce((sum, { count }) => sum + count, 0);
    const made = Buffer.alloc(references * pageBytes);
    const fromSets = await this.#readSets(runs);
    const result: PageRun[] = [];
    let at = 0;
    let isWhole = fromSets !== undefined;
    for (const run of runs) {
      const { page, count, kind } = run;
      const length = count * pageBytes;
      if (kind === 'zero') {
        result.push({ page, count, content: undefined });
        continue;
      }
      if (kind === 'literal') {
        const content = bytes.subarray(run.dataAt, run.dataAt + length);
        result.push({ page, count, content });
        this.#keep(page, count, content);
        continue;
      }
      const content = made.subarray(at, at + length);
      at += length;
      result.push({ page, count, content });
      if (kind !== 'set') isWhole = this.#fromMemory(run, bytes, content) && isWhole;
      else {
        fromSets?.get(run)?.copy(content);
        this.#keep(page, count, content);
      }
    }
    if (references === 0 || (isWhole && digestOf(digestBlocks(made)).equals(digest)))
      return { runs: result, missed: [] };
    const missed = runs
      .filter(isReference)
      .flatMap(({ page, count }) => Array.from({ length: count }, (_, index) => page + index));
    const bad = new Set(missed);
    return { runs: result.filter(({ page, content }) => !content || !bad.has(page)), missed };
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

  #fromMemory(run: ReadRun, bytes: Buffer, to: Buffer): boolean {
    try {
      for (let index = 0; index < run.count; index++) {
        const at = index * pageBytes;
        this.#current(run.kind === 'copy' ? run.from + index : run.page + index, to, at);
        if (run.kind === 'delta') xor(to, at, bytes, run.dataAt + at);
        // At once: the next page of the run may be a copy of this one.
        this.#keep(run.page + index, 1, to.subarray(at));
      }
      return true;
    } catch (error) {
      if (!(error instanceof AppError)) throw error;
      return false;
    }
  }

  #current(page: number, to: Buffer, at: number): void {
    const write = this.#lastWrite[page]!;
    if (write > this.#writes - recentPages && write > 0) {
      const from = (write % recentPages) * pageBytes;
      this.#recent.copy(to, at, from, from + pageBytes);
    } else if (this.#memory) this.#memory.read(page, 1, to, at);
    else throw new AppError('unsupported', `Page ${page} cannot be read back`);
  }

  #keep(page: number, count: number, content: Buffer): void {
    if (!this.#memory) return;
    for (let index = 0; index < count; index++) {
      this.#writes += 1;
      this.#lastWrite[page + index] = this.#writes;
      const from = index * pageBytes;
      content.copy(this.#recent, (this.#writes % recentPages) * pageBytes, from, from + pageBytes);
    }
  }
}

function xor(to: Buffer, at: number, by: Buffer, byAt: number): void {
  for (let index = 0; index < pageBytes; index++) to[at + index]! ^= by[byAt + index]!;
}
