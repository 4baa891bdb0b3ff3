/**
 * Writes an index file from blocks in any amount, with little memory: records go to parts by the first bits of
 * their digests, full ones spill to a file, and at the end part after part is sorted. All I/O is synchronous: it is
 * made for a thread of its own.
 */
import { closeSync, fsyncSync, openSync, readSync, renameSync, rmSync, writeSync } from 'node:fs';
import { blockBytes, digestBytes, digestOf, isZeroBlock } from './blocks.ts';
import { encodeHeader, fileBytesFor, recordBytes, recordsPerChunk } from './index-format.ts';
import type { SetName } from './reference-set.ts';

export interface IndexOptions {
  /** Path of the index; beside it stand two more files until it is done. */
  file: string;
  /** One that ends in ':' is completed by the digest of the records, in hexadecimal. */
  name: SetName;
  stamp: string;
  /** Blocks of the set, known or not. */
  blockCount: number;
}

export interface IndexFacts {
  /** The whole name. */
  name: SetName;
  /** Distinct contents. */
  records: number;
  zeroBlocks: number;
  fileBytes: number;
}

const recordsPerPart = 2 ** 18;
const mostParts = 1024;
const recordsInMemory = 1024;

export class IndexWriter implements Disposable {
  readonly #options: IndexOptions;
  readonly #spill: number;
  readonly #output: number;
  readonly #partBits: number;
  readonly #parts: Part[];
  #spilledBytes = 0;
  #zeroBlocks = 0;

  constructor(options: IndexOptions) {
    this.#options = options;
    const wanted = Math.min(mostParts, Math.ceil(options.blockCount / recordsPerPart));
    this.#partBits = Math.ceil(Math.log2(Math.max(1, wanted)));
    this.#parts = Array.from({ length: 2 ** this.#partBits }, () => ({
      held: [],
      heldRecords: 0,
      spilled: [],
    }));
    this.#spill = openSync(spillOf(this.#options.file), 'w+', 0o600);
    this.#output = openSync(partialOf(this.#options.file), 'w', 0o600);
  }

  /** Takes whole blocks, of which the first has the number `first`. Of equal ones the lowest number is kept. */
  add(first: number, bytes: Buffer): void {
    const count = Math.floor(bytes.length / blockBytes);
    for (let i = 0; i < count; i += 1) {
      const at = i * blockBytes;
      if (isZeroBlock(bytes, at)) this.#zeroBlocks += 1;
      else this.addDigest(first + i, digestOf(bytes.subarray(at, at + blockBytes)));
    }
  }

  /** The same for one block of which only the digest is known. */
  addDigest(block: number, digest: Uint8Array): void {
    const part = this.#parts[this.#partBits === 0 ? 0 : firstBits(digest, this.#partBits)]!;
    if (part.heldRecords % recordsInMemory === 0) {
      if (part.heldRecords > 0 && this.#parts.length > 1) this.#spillPart(part);
      part.held.push(Buffer.allocUnsafe(recordsInMemory * recordBytes));
    }
    const chunk = part.held.at(-1)!;
    const at = (part.heldRecords % recordsInMemory) * recordBytes;
    chunk.set(digest, at);
    chunk.writeUInt32LE(block, at + digestBytes);
    part.heldRecords += 1;
  }

  /** Sorts and writes; afterwards the file is whole, on the disk and under its name. */
  finish(): IndexFacts {
    const output = new RecordOutput(this.#output);
    for (const part of this.#parts) {
      const records = this.#take(part);
      for (const at of sortedDistinct(records)) output.add(records, at);
    }
    const { records, recordsDigest } = output.finish();
    const { name: given, stamp, blockCount } = this.#options;
    const name = given.endsWith(':') ? `${given}${recordsDigest.toString('hex')}` : given;
    writeWhole(this.#output, encodeHeader({ name, stamp, blockCount, records, recordsDigest }), 0);
    fsyncSync(this.#output);
    renameSync(partialOf(this.#options.file), this.#options.file);
    return { name, records, zeroBlocks: this.#zeroBlocks, fileBytes: fileBytesFor(records) };
  }

  /** Removes what is not whole. */
  [Symbol.dispose](): void {
    closeSync(this.#spill);
    closeSync(this.#output);
    removeUnfinished(this.#options.file);
  }

  #spillPart(part: Part): void {
    for (const chunk of part.held) {
      writeWhole(this.#spill, chunk, this.#spilledBytes);
      part.spilled.push(this.#spilledBytes);
      this.#spilledBytes += chunk.length;
    }
    part.held = [];
    part.heldRecords = 0;
  }

  /** All records of the part in the order in which they came. */
  #take(part: Part): Buffer {
    const chunkBytes = recordsInMemory * recordBytes;
    const spilledBytes = part.spilled.length * chunkBytes;
    const records = Buffer.allocUnsafe(spilledBytes + part.heldRecords * recordBytes);
    part.spilled.forEach((offset, i) => {
      readWhole(this.#spill, records.subarray(i * chunkBytes, (i + 1) * chunkBytes), offset);
    });
    part.held.forEach((chunk, i) => {
      chunk.copy(records, spilledBytes + i * chunkBytes);
    });
    part.held = [];
    return records;
  }
}

/** Removes what a writer that was killed has left beside the index. */
export function removeUnfinished(file: string): void {
  rmSync(spillOf(file), { force: true });
  rmSync(partialOf(file), { force: true });
}

const spillOf = (file: string): string => `${file}.spill`;
const partialOf = (file: string): string => `${file}.partial`;

interface Part {
  /** Chunks of `recordsInMemory` records; the last may be partly filled. */
  held: Buffer[];
  heldRecords: number;
  /** Where whole chunks lie in the spill file. */
  spilled: number[];
}

/** Writes records chunk by chunk. */
class RecordOutput {
  readonly #output: number;
  readonly #chunk = Buffer.allocUnsafe(recordsPerChunk * recordBytes);
  readonly #digests: Buffer[] = [];
  #inChunk = 0;

  constructor(output: number) {
    this.#output = output;
  }

  add(records: Buffer, at: number): void {
    records.copy(this.#chunk, this.#inChunk * recordBytes, at, at + recordBytes);
    this.#inChunk += 1;
    if (this.#inChunk === recordsPerChunk) this.#write();
  }

  finish(): { records: number; recordsDigest: Buffer } {
    const records = this.#digests.length * recordsPerChunk + this.#inChunk;
    if (this.#inChunk > 0) this.#write();
    return { records, recordsDigest: digestOf(Buffer.concat(this.#digests)) };
  }

  #write(): void {
    const bytes = this.#chunk.subarray(0, this.#inChunk * recordBytes);
    writeWhole(this.#output, bytes, fileBytesFor(this.#digests.length * recordsPerChunk));
    this.#digests.push(digestOf(bytes));
    this.#inChunk = 0;
  }
}

/**
 * Offsets of the records by digest, of equal ones that with the lowest block. Sorted are 64-bit keys: the first 32 bits of the digest
 * and the number of the record, which a typed array sorts natively; only equal 32 bits want a closer look.
 */
function* sortedDistinct(records: Buffer): Iterable<number> {
  const count = records.length / recordBytes;
  const keys = new BigUint64Array(count);
  const halves = new Uint32Array(keys.buffer);
  for (let i = 0; i < count; i += 1) {
    halves[2 * i] = i;
    halves[2 * i + 1] = records.readUInt32BE(i * recordBytes);
  }
  keys.sort();
  for (let from = 0; from < count; ) {
    let to = from + 1;
    while (to < count && halves[2 * to + 1] === halves[2 * from + 1]) to += 1;
    if (to === from + 1) yield halves[2 * from]! * recordBytes;
    else
      yield* distinct(
        records,
        Array.from({ length: to - from }, (_, i) => halves[2 * (from + i)]! * recordBytes),
      );
    from = to;
  }
}

function* distinct(records: Buffer, offsets: number[]): Iterable<number> {
  const compare = (a: number, b: number) => records.compare(records, b, b + digestBytes, a, a + digestBytes);
  const block = (at: number) => records.readUInt32LE(at + digestBytes);
  offsets.sort((a, b) => compare(a, b) || block(a) - block(b));
  for (const [i, offset] of offsets.entries())
    if (i === 0 || compare(offsets[i - 1]!, offset) !== 0) yield offset;
}

const firstBits = (digest: Uint8Array, bits: number): number =>
  ((digest[0]! << 8) | digest[1]!) >> (16 - bits);

function writeWhole(descriptor: number, bytes: Buffer, position: number): void {
  for (let at = 0; at < bytes.length; )
    at += writeSync(descriptor, bytes, at, bytes.length - at, position + at);
}

function readWhole(descriptor: number, into: Buffer, position: number): void {
  for (let at = 0; at < into.length; ) {
    const read = readSync(descriptor, into, at, into.length - at, position + at);
    if (read === 0) throw new Error(`the spill file ends at byte ${position + at}`);
    at += read;
  }
}
