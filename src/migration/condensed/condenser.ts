/**
 * Makes batches out of pages: of each it sends as little as the destination needs. In this order: nothing where it has
 * the same already, the number of a block that both ends hold, the number of a page that it has with the same
 * content, what changed since it was sent last, and else the page.
 *
 * A batch carries one digest over the digests of all pages that the destination must make out of what it has itself.
 * What travels whole needs none: TLS vouches for it.
 */
import { AppError } from '../../model/errors.ts';
import type { EngineStatistics } from '../../model/migration.ts';
import { digestBlocks, digestBytes, digestOf, noBlock, type SetIndex } from '../../pages/index.ts';
import { pageBytes } from '../../stream/index.ts';
import { BatchWriter } from './batch.ts';
import { type CompressionMode, Compressor } from './compression.ts';
import { DeltaCache } from './delta-cache.ts';
import { frame, frameOf } from './frames.ts';
import type { PageBatch } from './page-batch.ts';
import { PageSet } from './page-set.ts';
import { SentIndex } from './sent-index.ts';

export interface CondenserOptions {
  pages: number;
  /** By their numbers. */
  sets: readonly SetIndex[];
  /** The destination can read what its QEMU has got. */
  destinationReads: boolean;
  compression?: CompressionMode;
  /** Told of each batch once it is encoded: the digests of its pages with content, in order of their entries. */
  onEncoded?: (batch: PageBatch, digests: Buffer) => void;
  /** Bytes per second, as measured. */
  linkSpeed: () => number | undefined;
  statistics: EngineStatistics;
}

export class Condenser {
  readonly #options: CondenserOptions;
  readonly #sent: SentIndex;
  readonly #deltas: DeltaCache;
  readonly #everSent: PageSet;
  readonly #compressor: Compressor;
  #turn: Promise<unknown> = Promise.resolve();
  /** The guest runs at the destination: what its memory holds is its own business. */
  #isPostcopy = false;

  constructor(options: CondenserOptions) {
    this.#options = options;
    // Only for a destination that reads back: they count by the page.
    const tracked = options.destinationReads ? options.pages : 0;
    this.#sent = new SentIndex(tracked);
    this.#deltas = new DeltaCache(tracked);
    this.#everSent = new PageSet(options.pages);
    this.#compressor = new Compressor(options.compression);
  }

  enterPostcopy(): void {
    this.#isPostcopy = true;
  }

  /**
   * The frame of the batch, which is free again when `onTaken` was called. Batches are encoded one after the other,
   * in the order of the calls, and compressed side by side. `plain`: no reference to what the other end has.
   */
  async condense(batch: PageBatch, options: { plain?: boolean; onTaken: () => void }): Promise<Uint8Array[]> {
    const encoded = this.#turn.then(() => this.#encode(batch, options.plain ?? false));
    this.#turn = encoded.catch(() => {});
    const { body, digest } = await encoded.finally(options.onTaken);
    const { statistics, linkSpeed } = this.#options;
    const squeezed = await this.#compressor.squeeze(body, linkSpeed());
    statistics.cpuMs.compress += squeezed.tookMs;
    const head = Buffer.alloc(5);
    head[0] = Number(squeezed.compressed);
    head.writeUInt32BE(body.length, 1);
    return frameOf(frame.batch, head, digest, squeezed.bytes);
  }

  async #encode(batch: PageBatch, plain: boolean): Promise<{ body: Buffer; digest: Buffer }> {
    const { sets, statistics, destinationReads } = this.#options;
    const { cpuMs } = statistics;
    const content = batch.content.subarray(0, batch.dataPages * pageBytes);
    const startedAt = performance.now();
    const digests = digestBlocks(content);
    const digestedAt = performance.now();
    const found: Uint32Array[] = [];
    if (!plain && batch.dataPages > 0) for (const set of sets) found.push(await lookup(set, digests));
    const foundAt = performance.now();
    const words = new Uint32Array(content.buffer, content.byteOffset, content.length / 4);
    const writer = new BatchWriter();
    const references: Buffer[] = [];
    const mayRead = destinationReads && !plain && !this.#isPostcopy;
    let index = -1;
    for (const { page, zeroPages } of batch.entries) {
      if (zeroPages > 0) {
        this.#zero(writer, page, zeroPages);
        continue;
      }
      index += 1;
      const set = found.findIndex((blocks) => blocks[index] !== noBlock);
      const origin = mayRead && set < 0 ? this.#sent.find(digests, index) : -1;
      if (origin === page) {
        statistics.pages.unchanged += 1;
        continue;
      }
      const version = words.subarray((index * pageBytes) / 4, ((index + 1) * pageBytes) / 4);
      const delta = mayRead && set < 0 && origin < 0 ? this.#deltas.delta(page, version) : undefined;
      if (set >= 0) writer.add('set', page, 1, found[set]![index]!, set);
      else if (origin >= 0) writer.add('copy', page, 1, origin);
      else if (delta) writer.add('delta', page, 1);
      else writer.add('literal', page, 1);
      const kind = set >= 0 ? 'set' : origin >= 0 ? 'copy' : delta ? 'delta' : 'literal';
      statistics.pages[kind] += 1;
      if (kind === 'literal') writer.data(content.subarray(index * pageBytes, (index + 1) * pageBytes));
      else references.push(digests.subarray(index * digestBytes, (index + 1) * digestBytes));
      if (delta) writer.data(delta);
      if (!this.#isPostcopy) this.#remember(page, digests, index, version);
    }
    this.#options.onEncoded?.(batch, digests);
    const body = writer.finish();
    statistics.guestBytes += content.length;
    cpuMs.digest += digestedAt - startedAt;
    cpuMs.lookup += foundAt - digestedAt;
    cpuMs.encode += performance.now() - foundAt;
    return { body, digest: digestOf(Buffer.concat(references)) };
  }

  #zero(writer: BatchWriter, page: number, count: number): void {
    writer.add('zero', page, count);
    this.#options.statistics.pages.zero += count;
    if (!this.#options.destinationReads) return;
    for (let each = page; each < page + count; each++) {
      if (!this.#everSent.has(each)) continue;
      this.#sent.forget(each);
      this.#deltas.forget(each);
    }
  }

  #remember(page: number, digests: Buffer, index: number, version: Uint32Array): void {
    if (!this.#options.destinationReads) return;
    this.#sent.set(page, digests, index);
    // What is sent a second time will be sent a third time.
    if (!this.#everSent.add(page)) this.#deltas.put(page, version);
  }
}

/** A set whose index fails is one that has nothing. */
async function lookup(set: SetIndex, digests: Buffer): Promise<Uint32Array> {
  try {
    return await set.lookup(digests);
  } catch (error) {
    if (!(error instanceof AppError)) throw error;
    return new Uint32Array(digests.length / digestBytes).fill(noBlock);
  }
}
