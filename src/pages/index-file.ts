/**
 * An index file, open for look-ups.
 *
 * Of each record 4 bytes are held in memory, enough to tell with near certainty whether and where a digest is: a
 * directory by its first bits, then the next 32 bits (the *tag*) in the order of the file. The full digest is
 * compared with the record itself: in memory where the whole file is small, else read from the file, where the
 * kernel's page cache has it. So 20 GB of distinct blocks (5.2 million records, a file of 180 MB) take 22 MB, and a
 * digest that is not there costs no read.
 */
import { readSync } from 'node:fs';
import { type FileHandle, open } from 'node:fs/promises';
import { setImmediate as nextTurn } from 'node:timers/promises';
import { MiB } from '../model/units.ts';
import { digestBytes, digestOf, noBlock } from './blocks.ts';
import {
  damaged,
  decodeHeader,
  fileBytesFor,
  headerBytes,
  type IndexHeader,
  recordBytes,
  recordsPerChunk,
} from './index-format.ts';
import type { SetIndex, SetName } from './reference-set.ts';

export interface IndexFile extends SetIndex {
  readonly name: SetName;
  readonly stamp: string;
  readonly blockCount: number;
  /** What it holds in memory. */
  readonly heldBytes: number;
}

export interface OpenIndexOptions {
  /** A file up to this size is held whole. */
  wholeUpToBytes?: number;
  signal?: AbortSignal;
}

const defaultWholeUpToBytes = 16 * MiB;
/** Records that share one entry of the directory, on average. */
const recordsPerBucket = 16;
const mostDirectoryBits = 24;
/** Reads from the file block this thread; on a slow disk others get their turn after so long. */
const turnMs = 10;
const lookUpsBetweenLooks = 64;

/**
 * Reads the file once, checks it, and holds what look-ups need. Throws `image_corrupt` for a file that is damaged or
 * no index; then it is to be built anew.
 */
export async function openIndex(file: string, options: OpenIndexOptions = {}): Promise<IndexFile> {
  const { wholeUpToBytes = defaultWholeUpToBytes, signal } = options;
  await using undo = new AsyncDisposableStack();
  const handle = undo.use(await open(file, 'r'));
  const sizeBytes = (await handle.stat()).size;
  const header = decodeHeader(await readAt(handle, 0, Math.min(headerBytes, sizeBytes)), sizeBytes);
  const index = new OpenIndex(handle, header, sizeBytes <= wholeUpToBytes);
  await index.load(signal);
  undo.move();
  return index;
}

/** What the header says, without a look at the records. Throws `image_corrupt`. */
export async function readIndexHeader(file: string): Promise<Omit<IndexHeader, 'recordsDigest'>> {
  await using handle = await open(file, 'r');
  const sizeBytes = (await handle.stat()).size;
  return decodeHeader(await readAt(handle, 0, Math.min(headerBytes, sizeBytes)), sizeBytes);
}

class OpenIndex implements IndexFile {
  readonly #handle: FileHandle;
  readonly #header: IndexHeader;
  /** Bits that the directory goes by: a bucket is all digests that begin alike so far. */
  readonly #bits: number;
  /** Bucket i has the records from [i] up to [i + 1]. */
  readonly #directory: Uint32Array;
  readonly #tags: Uint32Array;
  readonly #whole: Buffer | undefined;
  readonly #record = Buffer.alloc(recordBytes);

  constructor(handle: FileHandle, header: IndexHeader, isWhole: boolean) {
    const { records } = header;
    this.#handle = handle;
    this.#header = header;
    this.#bits = Math.min(mostDirectoryBits, Math.ceil(Math.log2(Math.max(2, records / recordsPerBucket))));
    this.#directory = new Uint32Array(2 ** this.#bits + 1);
    this.#tags = new Uint32Array(records);
    this.#whole = isWhole ? Buffer.allocUnsafe(records * recordBytes) : undefined;
  }

  get name(): SetName {
    return this.#header.name;
  }

  get stamp(): string {
    return this.#header.stamp;
  }

  get blockCount(): number {
    return this.#header.blockCount;
  }

  get entries(): number {
    return this.#header.records;
  }

  get heldBytes(): number {
    return this.#directory.byteLength + this.#tags.byteLength + (this.#whole?.length ?? 0);
  }

  async load(signal: AbortSignal | undefined): Promise<void> {
    const { records, recordsDigest } = this.#header;
    const digests: Buffer[] = [];
    let bucket = 0;
    for (let from = 0; from < records; from += recordsPerChunk) {
      signal?.throwIfAborted();
      const count = Math.min(recordsPerChunk, records - from);
      const chunk = await readAt(this.#handle, fileBytesFor(from), count * recordBytes);
      digests.push(digestOf(chunk));
      this.#whole?.set(chunk, from * recordBytes);
      for (let i = 0; i < count; i += 1) {
        const at = i * recordBytes;
        const own = this.#bucketOf(chunk, at);
        if (own < bucket) throw damaged(`record ${from + i} is out of order`, 'ascending digests');
        while (bucket < own) this.#directory[++bucket] = from + i;
        this.#tags[from + i] = this.#tagOf(chunk, at);
      }
    }
    this.#directory.fill(records, bucket + 1);
    if (!digestOf(Buffer.concat(digests)).equals(recordsDigest))
      throw damaged('the digest of its records is wrong', 'undamaged records');
  }

  async lookup(digests: Uint8Array): Promise<Uint32Array> {
    const found = new Uint32Array(Math.floor(digests.length / digestBytes));
    let began = performance.now();
    for (let i = 0; i < found.length; i += 1) {
      found[i] = this.#find(digests, i * digestBytes);
      if (this.#whole || i % lookUpsBetweenLooks !== 0 || performance.now() - began < turnMs) continue;
      await nextTurn();
      began = performance.now();
    }
    return found;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#handle.close();
  }

  #find(digests: Uint8Array, at: number): number {
    const bucket = this.#bucketOf(digests, at);
    const tag = this.#tagOf(digests, at);
    let low = this.#directory[bucket]!;
    const end = this.#directory[bucket + 1]!;
    for (let high = end; low < high; ) {
      const middle = (low + high) >>> 1;
      if (this.#tags[middle]! < tag) low = middle + 1;
      else high = middle;
    }
    for (; low < end && this.#tags[low] === tag; low += 1) {
      const block = this.#compare(low, digests, at);
      if (block < this.#header.blockCount) return block;
    }
    return noBlock;
  }

  /** The block of the record if it has this digest, else `noBlock`. */
  #compare(number: number, digests: Uint8Array, at: number): number {
    let record: Buffer = this.#record;
    let base = 0;
    if (this.#whole) {
      record = this.#whole;
      base = number * recordBytes;
    } else {
      const read = readSync(this.#handle.fd, record, 0, recordBytes, fileBytesFor(number));
      if (read < recordBytes) throw damaged(`record ${number} is cut off`, `${recordBytes} bytes`);
    }
    for (let i = 0; i < digestBytes; i += 1) if (record[base + i] !== digests[at + i]) return noBlock;
    return record.readUInt32LE(base + digestBytes);
  }

  #bucketOf(digests: Uint8Array, at: number): number {
    return ((digests[at]! << 16) | (digests[at + 1]! << 8) | digests[at + 2]!) >>> (24 - this.#bits);
  }

  /** 32 bits of which the first are the bucket's last: together they keep the order of the digests. */
  #tagOf(digests: Uint8Array, at: number): number {
    const from = at + (this.#bits >>> 3);
    return (
      ((digests[from]! << 24) |
        (digests[from + 1]! << 16) |
        (digests[from + 2]! << 8) |
        digests[from + 3]!) >>>
      0
    );
  }
}

async function readAt(handle: FileHandle, position: number, length: number): Promise<Buffer> {
  const bytes = Buffer.allocUnsafeSlow(length);
  for (let at = 0; at < length; ) {
    const { bytesRead } = await handle.read(bytes, at, length - at, position + at);
    if (bytesRead === 0) throw damaged(`it ends at byte ${position + at}`, `${position + length} bytes`);
    at += bytesRead;
  }
  return bytes;
}
