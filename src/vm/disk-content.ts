/**
 * Reads what a guest sees of a raw or qcow2 file, backing files included, without converting it and without a
 * QEMU: compressed clusters, zero clusters, subclusters. Only for files that nobody writes to meanwhile, or
 * whose reader can bear stale bytes (a reference set can: every batch is judged by its digest).
 *
 * Bounds: tables and unpacked clusters are kept in two small caches; a chain of backing files has at most 8.
 */
import { type FileHandle, open } from 'node:fs/promises';
import { dirname, resolve } from 'node:path';
import { promisify } from 'node:util';
import { inflateRaw, zstdDecompress } from 'node:zlib';
import { AppError } from '../model/errors.ts';
import { MiB } from '../model/units.ts';
import { throwIfCancelled } from './cancel.ts';
import type { ImageFormat } from './image-check.ts';
import { isQcow2, maxHeaderBytes, parseQcow2Header, type Qcow2Header } from './qcow2.ts';
import { type Cluster, decodeCluster, offsetMask, stretchesOf } from './qcow2-cluster.ts';
import { RecentlyUsed } from './recently-used.ts';
import { zstdFrameBytes } from './zstd-frame.ts';

export interface Range {
  offset: number;
  lengthBytes: number;
}

/** The content of a disk as the guest sees it. */
export interface DiskContent extends AsyncDisposable {
  readonly virtualBytes: number;
  /** Fills `into` from `offset` on. Throws `image_corrupt`, also for a range that reaches beyond the disk. */
  read(offset: number, into: Buffer): Promise<void>;
  /** Where there may be anything but zeroes, ascending, stretches that touch joined. */
  dataRanges(signal: AbortSignal): AsyncIterable<Range>;
}

const maxChainFiles = 8;
const cacheBytes = 8 * MiB;
const inflate = promisify(inflateRaw);
const unpackZstd = promisify(zstdDecompress);

/**
 * Opens a disk for reading. `format` is what the record says, never guessed from the content: a guest could write
 * a qcow2 header into its raw disk.
 */
export function openDiskContent(file: string, format: ImageFormat): Promise<DiskContent> {
  return openInChain(file, format, 1);
}

async function openInChain(file: string, format: string, depth: number): Promise<DiskContent> {
  if (depth > maxChainFiles)
    throw corrupt(file, `its chain has more than ${maxChainFiles} files`, 'a shorter one');
  await using undo = new AsyncDisposableStack();
  const handle = undo.use(await open(file, 'r'));
  const fileBytes = (await handle.stat()).size;
  if (format === 'raw') {
    undo.move();
    return new RawContent(file, handle, Math.floor(fileBytes / 512) * 512);
  }
  const head = Buffer.alloc(Math.min(fileBytes, maxHeaderBytes));
  await readWhole(file, handle, 0, head);
  if (!isQcow2(head)) throw corrupt(file, 'it is not qcow2', 'the format of its record');
  const header = parseQcow2Header(head);
  if (header.encrypted || header.externalData || header.corrupt)
    throw corrupt(file, 'it is encrypted, corrupt or keeps its data elsewhere', 'a plain image');
  const l1 = Buffer.alloc(header.l1.entries * 8);
  await readWhole(file, handle, header.l1.offset, l1);
  const { backing } = header;
  const below =
    backing &&
    (await openInChain(resolve(dirname(file), backing.file), backing.format ?? 'qcow2', depth + 1));
  undo.move();
  return new Qcow2Content({ file, handle, header, l1, below });
}

class RawContent implements DiskContent {
  readonly virtualBytes: number;
  readonly #file: string;
  readonly #handle: FileHandle;

  constructor(file: string, handle: FileHandle, virtualBytes: number) {
    this.#file = file;
    this.#handle = handle;
    this.virtualBytes = virtualBytes;
  }

  read(offset: number, into: Buffer): Promise<void> {
    return readWhole(this.#file, this.#handle, offset, into);
  }

  async *dataRanges(): AsyncIterable<Range> {
    yield { offset: 0, lengthBytes: this.virtualBytes };
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.#handle.close();
  }
}

interface Qcow2Parts {
  file: string;
  handle: FileHandle;
  header: Qcow2Header;
  l1: Buffer;
  below: DiskContent | undefined;
}

class Qcow2Content implements DiskContent {
  readonly virtualBytes: number;
  readonly #parts: Qcow2Parts;
  readonly #clusterBytes: number;
  readonly #entryBytes: number;
  readonly #tables: RecentlyUsed<Buffer>;
  readonly #unpacked: RecentlyUsed<Buffer>;

  constructor(parts: Qcow2Parts) {
    this.#parts = parts;
    const { virtualBytes, clusterBytes, extendedL2 } = parts.header;
    this.virtualBytes = virtualBytes;
    this.#clusterBytes = clusterBytes;
    this.#entryBytes = extendedL2 ? 16 : 8;
    const kept = Math.max(2, Math.floor(cacheBytes / clusterBytes));
    this.#tables = new RecentlyUsed(kept);
    this.#unpacked = new RecentlyUsed(kept);
  }

  async read(offset: number, into: Buffer): Promise<void> {
    if (offset < 0 || offset + into.length > this.virtualBytes)
      throw corrupt(this.#parts.file, `bytes ${offset} to ${offset + into.length} were wanted`, 'its own');
    const reads: { fileOffset: number; into: Buffer }[] = [];
    for (let at = 0; at < into.length; ) {
      const inCluster = (offset + at) % this.#clusterBytes;
      const piece = into.subarray(at, at + this.#clusterBytes - inCluster);
      await this.#readInCluster(offset + at, inCluster, piece, reads);
      at += piece.length;
    }
    for (const each of joinReads(reads))
      await readWhole(this.#parts.file, this.#parts.handle, each.fileOffset, each.into);
  }

  async #readInCluster(
    offset: number,
    inCluster: number,
    into: Buffer,
    reads: { fileOffset: number; into: Buffer }[],
  ): Promise<void> {
    const cluster = await this.#cluster(Math.floor(offset / this.#clusterBytes));
    if (cluster.kind === 'compressed') {
      (await this.#unpack(cluster)).copy(into, 0, inCluster);
      return;
    }
    for (const stretch of stretchesOf(cluster, this.#clusterBytes)) {
      const from = Math.max(stretch.at, inCluster);
      const to = Math.min(stretch.at + stretch.lengthBytes, inCluster + into.length);
      if (from >= to) continue;
      const piece = into.subarray(from - inCluster, to - inCluster);
      if (stretch.kind === 'data')
        reads.push({ fileOffset: stretch.fileOffset + from - stretch.at, into: piece });
      else if (stretch.kind === 'zero') piece.fill(0);
      else await this.#readBelow(offset - inCluster + from, piece);
    }
  }

  /** The disk below may be shorter than this one; what it lacks is zero. */
  async #readBelow(offset: number, into: Buffer): Promise<void> {
    const { below } = this.#parts;
    const there = Math.max(0, Math.min(into.length, (below?.virtualBytes ?? 0) - offset));
    if (there > 0) await below!.read(offset, into.subarray(0, there));
    into.fill(0, there);
  }

  async #cluster(number: number): Promise<Cluster> {
    const perTable = this.#clusterBytes / this.#entryBytes;
    const table = await this.#table(Math.floor(number / perTable));
    if (!table) return { kind: 'absent' };
    const at = (number % perTable) * this.#entryBytes;
    const bitmap = this.#entryBytes === 16 ? table.readBigUInt64BE(at + 8) : undefined;
    return decodeCluster(table.readBigUInt64BE(at), bitmap, this.#clusterBytes);
  }

  /** The L2 table with this number in the L1 table; undefined where there is none. */
  async #table(number: number): Promise<Buffer | undefined> {
    const offset = Number(this.#parts.l1.readBigUInt64BE(number * 8) & offsetMask);
    if (offset === 0) return undefined;
    const kept = this.#tables.get(offset);
    if (kept) return kept;
    const table = Buffer.alloc(this.#clusterBytes);
    await readWhole(this.#parts.file, this.#parts.handle, offset, table);
    this.#tables.set(offset, table);
    return table;
  }

  async #unpack({ offset, lengthBytes }: { offset: number; lengthBytes: number }): Promise<Buffer> {
    const kept = this.#unpacked.get(offset);
    if (kept) return kept;
    const { file, handle, header } = this.#parts;
    // The last sector of the file may be cut short: the count is in whole sectors.
    const { buffer, bytesRead } = await handle.read(Buffer.alloc(lengthBytes), 0, lengthBytes, offset);
    const packed = buffer.subarray(0, bytesRead);
    const limits = { maxOutputLength: this.#clusterBytes };
    const unpacking =
      header.compression === 'zlib'
        ? inflate(packed, limits)
        : unpackZstd(packed.subarray(0, zstdFrameBytes(packed)), limits);
    const cluster = await unpacking.catch((cause: Error) => {
      throw corrupt(file, `the cluster at byte ${offset} does not unpack (${cause.message})`, 'whole bytes');
    });
    if (cluster.length !== this.#clusterBytes)
      throw corrupt(file, `the cluster at byte ${offset} has ${cluster.length} bytes`, 'a whole cluster');
    this.#unpacked.set(offset, cluster);
    return cluster;
  }

  async *dataRanges(signal: AbortSignal): AsyncIterable<Range> {
    yield* joinRanges(this.#allRanges(signal));
  }

  async *#allRanges(signal: AbortSignal): AsyncIterable<Range> {
    const below = this.#parts.below?.dataRanges(signal)[Symbol.asyncIterator]();
    let next = await below?.next();
    const clusters = Math.ceil(this.virtualBytes / this.#clusterBytes);
    for (let number = 0; number < clusters; number += 1) {
      const start = number * this.#clusterBytes;
      if (number % 1024 === 0) throwIfCancelled(signal, 'Read disk');
      const cluster = await this.#cluster(number);
      const isCompressed = cluster.kind === 'compressed';
      const stretches = isCompressed
        ? [{ kind: 'data' as const, at: 0, lengthBytes: this.#clusterBytes }]
        : stretchesOf(cluster, this.#clusterBytes);
      for (const { kind, at, lengthBytes } of stretches) {
        const offset = start + at;
        const end = Math.min(offset + lengthBytes, this.virtualBytes);
        if (kind === 'data' && end > offset) yield { offset, lengthBytes: end - offset };
        if (kind !== 'absent') continue;
        while (next && !next.done && next.value.offset + next.value.lengthBytes <= offset)
          next = await below!.next();
        while (next && !next.done && next.value.offset < end) {
          const from = Math.max(next.value.offset, offset);
          const belowEnd = next.value.offset + next.value.lengthBytes;
          yield { offset: from, lengthBytes: Math.min(belowEnd, end) - from };
          if (belowEnd > end) break;
          next = await below!.next();
        }
      }
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#parts.handle.close();
    await this.#parts.below?.[Symbol.asyncDispose]();
  }
}

async function* joinRanges(ranges: AsyncIterable<Range>): AsyncIterable<Range> {
  let last: Range | undefined;
  for await (const range of ranges) {
    if (last && last.offset + last.lengthBytes === range.offset) last.lengthBytes += range.lengthBytes;
    else {
      if (last) yield last;
      last = { ...range };
    }
  }
  if (last) yield last;
}

/** Reads that follow each other both in the file and in memory become one. */
function joinReads(reads: { fileOffset: number; into: Buffer }[]): { fileOffset: number; into: Buffer }[] {
  const joined: { fileOffset: number; into: Buffer }[] = [];
  for (const each of reads) {
    const last = joined.at(-1);
    const follows =
      last &&
      last.fileOffset + last.into.length === each.fileOffset &&
      last.into.byteOffset + last.into.length === each.into.byteOffset;
    if (!follows) joined.push({ ...each });
    else last.into = Buffer.from(last.into.buffer, last.into.byteOffset, last.into.length + each.into.length);
  }
  return joined;
}

async function readWhole(file: string, handle: FileHandle, offset: number, into: Buffer): Promise<void> {
  for (let at = 0; at < into.length; ) {
    const { bytesRead } = await handle.read(into, at, into.length - at, offset + at);
    if (bytesRead === 0)
      throw corrupt(file, `it ends at byte ${offset + at}`, `${into.length} bytes from ${offset}`);
    at += bytesRead;
  }
}

const corrupt = (file: string, met: string, wanted: string): AppError =>
  new AppError('image_corrupt', `Read disk ${file}: ${met}, wanted ${wanted}`);
