/**
 * Stands at the source between QEMU's mirror of the disk, for which it is an NBD server, and the link.
 *
 * A write is answered when it is in the queue, which is short; only a flush waits until everything before it is on the
 * destination's disk. QEMU flushes when the mirror has caught up and at its end, and fails the mirror if that fails:
 * so nothing is believed to be there that is not.
 *
 * Content that goes over once becomes a set of its own: the source knows by digest which block of the destination's
 * disk has it, and refers to that, for the disk and for memory alike. Order is kept by one rule: a block stands in a
 * batch once, and the destination ends with one frame before it begins the next.
 */
import type { Socket } from 'node:net';
import type { Duplex } from 'node:stream';
import type { EngineStatistics } from '../../model/migration.ts';
import { type Backend, NbdError, serveNbdOn } from '../../nbd/index.ts';
import {
  blockBytes,
  digestBytes,
  isZeroBlock,
  type MemoryIndex,
  type SetIndex,
  type SetName,
} from '../../pages/index.ts';
import { exportName } from '../mirror.ts';
import type { CompressionMode } from './compression.ts';
import { Condenser } from './condenser.ts';
import { encodeNumbers, encodeRagged, encodeZeroes, parseDiskOffer, parseNumbers } from './disk-frames.ts';
import { firstOf, framesOf } from './frame-stream.ts';
import { agentError, encodeJson, frame, protocolVersion } from './frames.ts';
import { Outbox } from './outbox.ts';
import { PageBatch } from './page-batch.ts';

export interface DiskSourceOptions {
  /** QEMU as the client of an NBD server. */
  qemu: Socket;
  link: Duplex;
  /** Undefined for sets that are not known here. They are the agent's to dispose of. */
  openIndex: (name: SetName) => Promise<SetIndex | undefined>;
  /** Learns which block of the destination's disk has which content; see `mirroredSet`. */
  mirrored: MemoryIndex;
  limitBps: () => number | undefined;
  compression?: CompressionMode;
  statistics: EngineStatistics;
}

/** Batches that the destination has not said it took: they are kept, for it may want blocks again. */
const mostUntaken = 32;
/** Writes that follow each other sooner are flushed together. */
const calmMs = 50;

interface Untaken {
  number: number;
  /** By block, where in `content` it lies. */
  places: Map<number, number>;
  content: Buffer;
}

export class DiskSource implements Backend {
  readonly #options: DiskSourceOptions;
  readonly #abort = new AbortController();
  readonly #outbox: Outbox;
  readonly #sets: SetIndex[] = [];
  readonly #untaken: Untaken[] = [];
  /** The last batch that has the block, of those that are not taken. */
  readonly #lastBatch = new Map<number, number>();
  readonly #flushes = new Map<number, () => void>();
  #batch = new PageBatch();
  readonly #inBatch = new Set<number>();
  #condenser: Condenser | undefined;
  #batches = 0;
  #flushNumber = 0;
  /** Writes that have come, and those of them that the destination has on its disk for sure. */
  #writes = 0;
  #flushedWrites = 0;
  #resent = 0;
  sizeBytes = 0;
  /** Runs out when nothing has been written for a while. */
  #calm: NodeJS.Timeout | undefined;

  constructor(options: DiskSourceOptions) {
    this.#options = options;
    const { link, limitBps } = options;
    this.#outbox = new Outbox({
      link,
      signal: this.#abort.signal,
      limitBps,
      onSent: (pieces) => this.#condenser?.takeBack(pieces),
    });
  }

  get statistics(): EngineStatistics {
    const { statistics } = this.#options;
    statistics.wireBytes = this.#outbox.sentBytes;
    return statistics;
  }

  /**
   * Whether the destination has yet to say that it has written the block: memory, which goes another way, must not
   * refer to it before.
   */
  isPending(block: number): boolean {
    return this.#lastBatch.has(block);
  }

  /** Resolves when QEMU has taken its leave. Whatever breaks it, it destroys the link and QEMU's connection. */
  async run(): Promise<void> {
    const { link, qemu } = this.#options;
    try {
      const frames = framesOf(link);
      await this.#hello(await firstOf(frames, frame.diskOffer, 'offer of a disk'));
      const served = serveNbdOn(qemu, { exportName, backend: this });
      served.catch(() => {});
      await Promise.race([served, this.#listen(frames), this.#outbox.failed]);
      link.end();
    } catch (error) {
      link.destroy();
      throw error;
    } finally {
      this.#abort.abort();
      clearTimeout(this.#calm);
      qemu.destroy();
      for (const set of this.#sets) await set[Symbol.asyncDispose]();
    }
  }

  // --- what QEMU asks for

  async read(): Promise<Buffer> {
    throw new NbdError('EIO', 'a mirror is written and not read');
  }

  async write(offset: number, bytes: Buffer, { fua }: { fua: boolean }): Promise<void> {
    this.#writes += 1;
    await this.#room();
    const firstWhole = Math.ceil(offset / blockBytes);
    const endWhole = Math.floor((offset + bytes.length) / blockBytes);
    if (endWhole <= firstWhole) {
      const border = firstWhole * blockBytes;
      // Inside one block, or over the border of two without filling either.
      if (border <= offset || border >= offset + bytes.length) this.#ragged(offset, bytes);
      else {
        this.#ragged(offset, bytes.subarray(0, border - offset));
        this.#ragged(border, bytes.subarray(border - offset));
      }
    } else {
      const skip = firstWhole * blockBytes - offset;
      if (skip > 0) this.#ragged(offset, bytes.subarray(0, skip));
      for (let block = firstWhole; block < endWhole; block += 1)
        this.#block(block, bytes, block * blockBytes - offset);
      const rest = endWhole * blockBytes - offset;
      if (rest < bytes.length) this.#ragged(endWhole * blockBytes, bytes.subarray(rest));
    }
    if (fua) await this.flush();
    else this.#flushWhenIdle();
    this.#flushWhenCalm();
  }

  async writeZeroes(offset: number, lengthBytes: number, { fua }: { fua: boolean }): Promise<void> {
    await this.#zeroes(offset, lengthBytes, false);
    if (fua) await this.flush();
    this.#flushWhenCalm();
  }

  async trim(offset: number, lengthBytes: number, { fua }: { fua: boolean }): Promise<void> {
    await this.#zeroes(offset, lengthBytes, true);
    if (fua) await this.flush();
    this.#flushWhenCalm();
  }

  /**
   * Once more as long as something had to be sent again meanwhile. QEMU flushes several times while the VM stands still;
   * where nothing was written in between, that costs no round trip.
   */
  async flush(): Promise<void> {
    const writes = this.#writes;
    if (this.#abort.signal.aborted) throw agentError('its end before a flush');
    if (writes === this.#flushedWrites) return;
    for (let resent = -1; resent !== this.#resent; ) {
      resent = this.#resent;
      this.#sendBatch();
      this.#flushNumber = (this.#flushNumber + 1) % 2 ** 32;
      const { promise, resolve } = Promise.withResolvers<void>();
      this.#flushes.set(this.#flushNumber, resolve);
      this.#outbox.send(encodeNumbers(frame.diskFlush, [this.#flushNumber]));
      await Promise.race([promise, this.#outbox.failed]);
    }
    this.#flushedWrites = Math.max(this.#flushedWrites, writes);
  }

  // ---

  async #hello(body: Buffer): Promise<void> {
    const { openIndex, mirrored, compression, statistics } = this.#options;
    const { sizeBytes, sets } = parseDiskOffer(body);
    this.sizeBytes = sizeBytes;
    const chosen: SetName[] = [];
    for (const name of sets) {
      const index = await openIndex(name);
      if (!index) continue;
      chosen.push(name);
      this.#sets.push(index);
    }
    this.#condenser = new Condenser({
      pages: Math.ceil(sizeBytes / blockBytes),
      sets: [...this.#sets, mirrored],
      destinationReads: false,
      ...(compression && { compression }),
      onEncoded: (batch, digests) => this.#learn(batch, digests),
      linkSpeed: () => this.#outbox.speed,
      statistics,
    });
    this.#outbox.send(encodeJson(frame.hello, { version: protocolVersion, sets: chosen }));
  }

  #learn(batch: PageBatch, digests: Buffer): void {
    const { mirrored } = this.#options;
    let at = 0;
    for (const { page, zeroPages } of batch.entries) {
      for (let block = page; block < page + zeroPages; block += 1) mirrored.delete(block);
      if (zeroPages > 0) continue;
      mirrored.set(page, digests, at);
      at += digestBytes;
    }
  }

  #block(block: number, bytes: Buffer, at: number): void {
    if (this.#inBatch.has(block) || this.#batch.isFull) this.#sendBatch();
    this.#inBatch.add(block);
    if (isZeroBlock(bytes, at)) this.#batch.addZero(block);
    else this.#batch.addPage(block, bytes, at);
  }

  #ragged(offset: number, bytes: Buffer): void {
    this.#sendBatch();
    this.#forget(offset, bytes.length);
    this.#outbox.send(encodeRagged(offset, Buffer.from(bytes)));
  }

  async #zeroes(offset: number, lengthBytes: number, isTrim: boolean): Promise<void> {
    this.#writes += 1;
    await this.#room();
    this.#sendBatch();
    this.#forget(offset, lengthBytes);
    this.#outbox.send(encodeZeroes(offset, lengthBytes, isTrim));
  }

  /** These blocks have another content now: not one to refer to, nor one to send again. */
  #forget(offset: number, lengthBytes: number): void {
    const first = Math.floor(offset / blockBytes);
    const end = Math.ceil((offset + lengthBytes) / blockBytes);
    const { mirrored } = this.#options;
    // Whichever are fewer: a trim may be as large as the disk.
    const known = end - first > mirrored.entries ? mirrored.blocks() : range(first, end);
    for (const block of known) if (block >= first && block < end) mirrored.delete(block);
    for (const block of this.#lastBatch.keys())
      if (block >= first && block < end) this.#lastBatch.delete(block);
  }

  #flushWhenIdle(): void {
    if (this.#batch.isEmpty) return;
    if (this.#outbox.isIdle) this.#sendBatch();
    else this.#outbox.onRoom(() => this.#flushWhenIdle());
  }

  /** QEMU flushes when the VM stands still, which is too late to begin with what could have been on the disk long ago. */
  #flushWhenCalm(): void {
    if (this.#abort.signal.aborted) return;
    clearTimeout(this.#calm);
    // What breaks it breaks the mirror, and is told there.
    this.#calm = setTimeout(() => void this.flush().catch(() => {}), calmMs);
  }

  #sendBatch(plain = false): void {
    if (this.#batch.isEmpty) return;
    const batch = this.#batch;
    this.#batch = new PageBatch();
    this.#inBatch.clear();
    const number = this.#batches;
    this.#batches = (this.#batches + 1) % 2 ** 32;
    const places = new Map<number, number>();
    for (const { page, zeroPages } of batch.entries) {
      for (let block = page; block < page + zeroPages; block += 1) this.#lastBatch.delete(block);
      if (zeroPages > 0) continue;
      this.#lastBatch.set(page, number);
      places.set(page, places.size * blockBytes);
    }
    this.#untaken.push({ number, places, content: batch.content });
    this.#outbox.send(this.#condenser!.condense(batch, { plain, onTaken: () => {} }));
  }

  /** The batch is written there, but for these blocks, which could not be made of what they refer to. */
  #taken([number, ...missed]: [number, ...number[]]): void {
    const taken = this.#untaken.shift();
    if (taken?.number !== number) throw agentError(`an answer to batch ${number} out of turn`);
    if (missed.length > 0) this.#sendBatch();
    for (const block of missed) {
      const at = taken.places.get(block);
      if (at === undefined) throw agentError(`a wish for block ${block} of a batch without it`);
      // Was it written again since, then that is on its way.
      if (this.#lastBatch.get(block) !== number) continue;
      this.#batch.addPage(block, taken.content, at);
      this.#resent += 1;
      this.#options.statistics.repairedPages += 1;
    }
    if (missed.length > 0) this.#sendBatch(true);
    for (const block of taken.places.keys())
      if (this.#lastBatch.get(block) === number) this.#lastBatch.delete(block);
    this.#outbox.kick();
  }

  async #listen(frames: AsyncIterable<{ type: number; body: Buffer }>): Promise<never> {
    for await (const { type, body } of frames) {
      if (type === frame.diskTaken) this.#taken(parseNumbers(body));
      else if (type === frame.diskFlushed) {
        const [number] = parseNumbers(body);
        this.#flushes.get(number)?.();
        this.#flushes.delete(number);
      } else if (type === frame.lost) this.#condenser?.drop(body);
      else throw agentError(`a frame of type ${type} out of place`);
    }
    throw agentError('its end while QEMU still mirrors');
  }

  /** Until the queue is short enough for another write. */
  async #room(): Promise<void> {
    await this.#outbox.room();
    while (this.#untaken.length >= mostUntaken && !this.#abort.signal.aborted) await this.#outbox.change();
  }
}

function* range(first: number, end: number): Iterable<number> {
  for (let number = first; number < end; number += 1) yield number;
}
