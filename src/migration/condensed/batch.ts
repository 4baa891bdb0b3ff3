/**
 * A batch of pages as bytes: a list of runs, each with a kind, then the data of those that travel. Page numbers are
 * told relative to where the run before ended, so that most runs take four bytes.
 *
 *   u32 length of the runs, the runs, data
 *   run: kind, zigzag(first page - end of the run before), count, and by kind
 *     zero     -
 *     literal  4096 bytes of data for each page
 *     set      number of the set, zigzag(first block - end of the last run of blocks): both ends hold it
 *     copy     zigzag(first page of the origin - first page): what these pages now are at the destination
 *     delta    4096 bytes of data: xor with what the page now is at the destination
 *
 * Numbers are unsigned LEB128.
 */
import { pageBytes } from '../../stream/index.ts';
import { agentError, batchPages } from './frames.ts';
import { readNumber, unzigzag, writeNumber, zigzag } from './numbers.ts';

export const kinds = ['zero', 'literal', 'set', 'copy', 'delta'] as const;
export type Kind = (typeof kinds)[number];

export interface Run {
  kind: Kind;
  page: number;
  count: number;
  /** Of `set`: its number, and the first block; of `copy`: the first page of the origin. */
  set: number;
  from: number;
}

const maxRunBytes = 24;
/** Zero runs and others together. */
export const maxRuns = 1024;

export class BatchWriter {
  #runs = Buffer.allocUnsafe(4096);
  #at = 4;
  /** Where the data of one run after the other lies. */
  #data: { from: Buffer; start: number; end: number }[] = [];
  #dataBytes = 0;
  #open: Run | undefined;
  #nextPage = 0;
  #nextBlock = 0;

  /** Joins the run with the one before where it goes on from it. */
  add(kind: Kind, page: number, count: number, from = 0, set = 0): void {
    const open = this.#open;
    const continues =
      open?.kind === kind &&
      open.page + open.count === page &&
      open.set === set &&
      ((kind !== 'set' && kind !== 'copy') || open.from + open.count === from);
    if (continues) open.count += count;
    else {
      this.#close();
      this.#open = { kind, page, count, set, from };
    }
  }

  /** Data of the last run: these bytes, which may not change until it is finished. */
  data(from: Buffer, start = 0, end = from.length): void {
    this.#dataBytes += end - start;
    const last = this.#data.at(-1);
    if (last?.from === from && last.end === start) last.end = end;
    else this.#data.push({ from, start, end });
  }

  /** The most that `finish` will write. */
  get bytes(): number {
    return this.#at + this.#dataBytes + maxRunBytes;
  }

  /** Writes it at the beginning of `to`, which has room for `bytes`. */
  finish(to: Buffer): Buffer {
    this.#close();
    const runs = this.#runs;
    runs.writeUInt32BE(this.#at - 4, 0);
    let at = runs.copy(to, 0, 0, this.#at);
    for (const { from, start, end } of this.#data) at += from.copy(to, at, start, end);
    return to.subarray(0, at);
  }

  #close(): void {
    const run = this.#open;
    if (!run) return;
    if (this.#at + maxRunBytes > this.#runs.length)
      this.#runs = Buffer.concat([this.#runs], this.#runs.length * 2);
    this.#runs[this.#at++] = kinds.indexOf(run.kind);
    this.#number(zigzag(run.page - this.#nextPage));
    this.#number(run.count);
    this.#nextPage = run.page + run.count;
    if (run.kind === 'set') {
      this.#number(run.set);
      this.#number(zigzag(run.from - this.#nextBlock));
      this.#nextBlock = run.from + run.count;
    }
    if (run.kind === 'copy') this.#number(zigzag(run.from - run.page));
    this.#open = undefined;
  }

  #number(value: number): void {
    this.#at = writeNumber(this.#runs, this.#at, value);
  }
}

/** `dataAt` is where the run's data begins in the batch. */
export interface ReadRun extends Run {
  dataAt: number;
}

/** Throws for what no source writes: pages outside of the table, more than a batch holds, data that is missing. */
export function readBatch(bytes: Buffer, totalPages: number): ReadRun[] {
  if (bytes.length < 4) throw agentError('a batch without runs');
  const end = 4 + bytes.readUInt32BE(0);
  if (end > bytes.length) throw agentError('a batch whose runs are longer than itself');
  const runs: ReadRun[] = [];
  const cursor = { bytes, at: 4, end };
  let dataAt = end;
  let pages = 0;
  let nextPage = 0;
  let nextBlock = 0;
  while (cursor.at < end) {
    const kind = kinds[bytes[cursor.at++]!];
    if (!kind) throw agentError('a run of an unknown kind');
    const page = nextPage + unzigzag(readNumber(cursor));
    const count = readNumber(cursor);
    nextPage = page + count;
    const run: ReadRun = { kind, page, count, set: 0, from: 0, dataAt };
    if (kind === 'set') {
      run.set = readNumber(cursor);
      run.from = nextBlock + unzigzag(readNumber(cursor));
      nextBlock = run.from + count;
    }
    if (kind === 'copy') run.from = page + unzigzag(readNumber(cursor));
    if (kind === 'literal' || kind === 'delta') dataAt += count * pageBytes;
    if (kind !== 'zero') pages += count;
    const isInside = page >= 0 && count > 0 && nextPage <= totalPages && run.from >= 0;
    const hasOrigin = kind !== 'copy' || run.from + count <= totalPages;
    if (!isInside || !hasOrigin || pages > batchPages || runs.length >= maxRuns * 2)
      throw agentError(`a run of ${count} pages from ${page} as ${kind} of ${run.from}`);
    runs.push(run);
  }
  if (dataAt !== bytes.length) throw agentError(`a batch with ${bytes.length - dataAt} bytes too many`);
  return runs;
}
