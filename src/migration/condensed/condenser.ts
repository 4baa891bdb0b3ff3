/**
 * Makes batches out of pages: of each it sends as little as the destination needs. In this order: nothing where it has
 * the same already, the number of a block that both ends hold, the number of a page that it has with the same
 * content, what changed since it was sent last, and else the page.
 *
 * A batch carries two digests: one over all that travels, and one over the pages that the destination must make out of
 * what it has itself. The first one guards against us, since TLS vouches for the link; the second one against beliefs.
 *
 * The digest of a page, by which it is looked for, is what costs most. On a link that is faster than digests are made,
 * a batch is sent *blind*, without a look, as long as looking has found next to nothing.
 */
import { AppError } from '../../model/errors.ts';
import type { EngineStatistics } from '../../model/migration.ts';
import { MiB } from '../../model/units.ts';
import { digestBlocks, digestBytes, digestOf, noBlock, type SetIndex } from '../../pages/index.ts';
import { pageBytes } from '../../stream/index.ts';
import { BatchWriter } from './batch.ts';
import { type CompressionMode, Compressor } from './compression.ts';
import { DeltaCache } from './delta-cache.ts';
import { batchPages, frame, frameOf, maxBatchBytes } from './frames.ts';
import type { PageBatch } from './page-batch.ts';
import { PageSet } from './page-set.ts';
import { SentIndex } from './sent-index.ts';

/** Faster links do not wait for digests, as long as one page in so many bytes per second is found. */
const digestBytesPerSecond = 1e9;
/** On slower links there is always time for them. */
const blindFromBytesPerSecond = 150e6;
/** Before so much has gone out, buffers on the way make a slow link look fast. */
const leastSentBytes = 64 * MiB;
/** How often a batch is looked at all the same, to notice that there is something to find again. */
const lookEvery = 8;
const smoothing = 0.4;
/** Less is asked for by a guest that waits, or the end of a round. */
const smallPages = 64;

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
  /** Buffers for batches that are compressed, and for large ones that are not. */
  readonly #spare: Buffer[] = [];
  /** By bodies on their way: the buffer that is free again when they have left. */
  readonly #lent = new WeakMap<Uint8Array, Buffer>();
  /** Batches are encoded one at a time. */
  readonly #references = Buffer.allocUnsafeSlow(batchPages * pageBytes);
  #turn: Promise<unknown> = Promise.resolve();
  /** Of pages that were looked for, the share that was found. */
  #foundShare = 1;
  #blindInRow = 0;
  #sentBytes = 0;
  readonly #dropped = new Set<number>();
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

  /** The destination has lost these sets: nothing refers to them any more. */
  drop(sets: Iterable<number>): void {
    for (const set of sets) this.#dropped.add(set);
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
    const { body, digest, scratch } = await encoded.finally(options.onTaken);
    const head = Buffer.alloc(5);
    head.writeUInt32BE(body.length, 1);
    if (!scratch) return frameOf(frame.batch, head, digest, body);
    const squeezed = await this.#compressor.squeeze(body);
    this.#spare.push(wholeOf(scratch));
    this.#options.statistics.cpuMs.compress += squeezed.tookMs;
    head[0] = Number(squeezed.compressed);
    return frameOf(frame.batch, head, digest, squeezed.bytes);
  }

  /** Pieces that have left, whose buffers are used again. Who does not say so leaves them to the garbage collector. */
  takeBack(pieces: readonly Uint8Array[]): void {
    for (const piece of pieces) {
      const buffer = this.#lent.get(piece);
      if (!buffer) continue;
      this.#lent.delete(piece);
      this.#spare.push(buffer);
    }
  }

  get hasSets(): boolean {
    return this.#options.sets.length > 0;
  }

  /** Whether a set that both ends hold has the page, for each page with content. */
  async inSets(batch: PageBatch): Promise<boolean[]> {
    const { sets, statistics } = this.#options;
    const startedAt = performance.now();
    const digests = digestBlocks(batch.content.subarray(0, batch.dataPages * pageBytes));
    statistics.cpuMs.digest += performance.now() - startedAt;
    const found = await Promise.all(sets.map((set) => lookup(set, digests)));
    return Array.from({ length: batch.dataPages }, (_, index) =>
      found.some((blocks) => blocks[index] !== noBlock),
    );
  }

  /** With `scratch` the body is to be compressed, and `scratch` is to be given back then. */
  async #encode(
    batch: PageBatch,
    plain: boolean,
  ): Promise<{ body: Buffer; digest: Buffer; scratch: Buffer | undefined }> {
    const { statistics, linkSpeed } = this.#options;
    const { cpuMs } = statistics;
    const content = batch.content.subarray(0, batch.dataPages * pageBytes);
    const writer = new BatchWriter();
    const startedAt = performance.now();
    const isBlind = this.#isBlind(batch, plain);
    const digests = isBlind ? undefined : digestBlocks(content);
    cpuMs.digest += performance.now() - startedAt;
    const references = await this.#choose(batch, { plain, digests, writer, content });
    if (digests) this.#options.onEncoded?.(batch, digests);
    const chosenAt = performance.now();
    const isSqueezed = this.#compressor.pays(writer.bytes, linkSpeed());
    // A small one that stays as it is would keep far more than itself.
    const isPooled = isSqueezed || writer.bytes > maxBatchBytes / 2;
    const buffer = isPooled ? this.#spare.pop() : undefined;
    const room = isPooled ? maxBatchBytes : writer.bytes;
    const body = writer.finish(buffer ?? Buffer.allocUnsafeSlow(room));
    const scratch = isSqueezed ? body : undefined;
    if (isPooled && !isSqueezed) this.#lent.set(body, wholeOf(body));
    const writtenAt = performance.now();
    const digest = Buffer.concat([digestOf(body), digestOf(references)]);
    statistics.guestBytes += content.length;
    this.#sentBytes += body.length;
    cpuMs.encode += writtenAt - chosenAt;
    cpuMs.digest += performance.now() - writtenAt;
    return { body, digest, scratch };
  }

  /**
   * Puts the pages into the batch, each as what is least; gives the content of those that are made of references, one
   * behind the other, until the next call.
   */
  async #choose(
    batch: PageBatch,
    from: { plain: boolean; digests: Buffer | undefined; writer: BatchWriter; content: Buffer },
  ): Promise<Buffer> {
    const { plain, digests, writer, content } = from;
    const { sets, statistics, destinationReads } = this.#options;
    const startedAt = performance.now();
    const found: Uint32Array[] = [];
    if (digests && !plain && batch.dataPages > 0)
      for (const [number, set] of sets.entries())
        found.push(this.#dropped.has(number) ? nothing(digests) : await lookup(set, digests));
    const foundAt = performance.now();
    const words = new Uint32Array(content.buffer, content.byteOffset, content.length / 4);
    const mayRead = destinationReads && !plain && !this.#isPostcopy;
    let referenceBytes = 0;
    let known = 0;
    let index = -1;
    for (const { page, zeroPages } of batch.entries) {
      if (zeroPages > 0) {
        this.#zero(writer, page, zeroPages);
        continue;
      }
      index += 1;
      const set = found.findIndex((blocks) => blocks[index] !== noBlock);
      const origin = mayRead && digests && set < 0 ? this.#sent.find(digests, index) : -1;
      if (set >= 0 || origin >= 0) known += 1;
      if (origin === page) {
        statistics.pages.unchanged += 1;
        continue;
      }
      const wordsAt = (index * pageBytes) / 4;
      const delta = mayRead && set < 0 && origin < 0 ? this.#deltas.delta(page, words, wordsAt) : undefined;
      const kind = set >= 0 ? 'set' : origin >= 0 ? 'copy' : delta ? 'delta' : 'literal';
      statistics.pages[kind] += 1;
      if (kind === 'set') writer.add(kind, page, 1, found[set]![index]!, set);
      else if (kind === 'copy') writer.add(kind, page, 1, origin);
      else writer.add(kind, page, 1);
      const [start, end] = [index * pageBytes, (index + 1) * pageBytes];
      if (kind !== 'literal') referenceBytes += content.copy(this.#references, referenceBytes, start, end);
      if (delta) writer.data(delta);
      else if (kind === 'literal') writer.data(content, start, end);
      if (!this.#isPostcopy) this.#remember(page, digests, index, words);
    }
    if (digests && !plain && batch.dataPages >= smallPages)
      this.#foundShare += (known / batch.dataPages - this.#foundShare) * smoothing;
    statistics.cpuMs.lookup += foundAt - startedAt;
    statistics.cpuMs.encode += performance.now() - foundAt;
    return this.#references.subarray(0, referenceBytes);
  }

  /** Whether digests of the pages would cost more time than they are likely to save. */
  #isBlind(batch: PageBatch, plain: boolean): boolean {
    const { linkSpeed, onEncoded } = this.#options;
    const speed = linkSpeed() ?? 0;
    if (onEncoded) return false;
    if (plain) return true;
    if (this.#sentBytes < leastSentBytes) return false;
    const pays = speed < blindFromBytesPerSecond || this.#foundShare > speed / digestBytesPerSecond;
    if (pays || batch.dataPages < smallPages || this.#blindInRow >= lookEvery) {
      this.#blindInRow = 0;
      return false;
    }
    this.#blindInRow += 1;
    return true;
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

  #remember(page: number, digests: Buffer | undefined, index: number, words: Uint32Array): void {
    if (!this.#options.destinationReads) return;
    if (digests) this.#sent.set(page, digests, index);
    else this.#sent.forget(page);
    // What is sent a second time will be sent a third time.
    if (!this.#everSent.add(page)) this.#deltas.put(page, words, (index * pageBytes) / 4);
  }
}

/** The buffer that this one is the beginning of. */
const wholeOf = ({ buffer }: Buffer): Buffer => Buffer.from(buffer);

const nothing = (digests: Buffer): Uint32Array => new Uint32Array(digests.length / digestBytes).fill(noBlock);

/** A set whose index fails is one that has nothing. */
async function lookup(set: SetIndex, digests: Buffer): Promise<Uint32Array> {
  try {
    return await set.lookup(digests);
  } catch (error) {
    if (!(error instanceof AppError)) throw error;
    return nothing(digests);
  }
}
