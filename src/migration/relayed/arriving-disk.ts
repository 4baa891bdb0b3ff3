/**
 * At the destination: the disk of a VM that came by way of relays, as an NBD server for its QEMU. What is here is read
 * from below (the image, and what was fetched); the rest is fetched first, what the guest reads before all else. Nothing
 * that the VM writes comes here: QEMU keeps that in an overlay of its own.
 *
 * What is here is not written down: after a restart all of it is fetched again, as far as it was not whole.
 */
import type { Duplex } from 'node:stream';
import { AppError, asAppError } from '../../model/errors.ts';
import type { MergeStatistics } from '../../model/migration.ts';
import { type Backend, type NbdClient, NbdError } from '../../nbd/index.ts';
import { blockBytes, isZeroBlock } from '../../pages/index.ts';
import { delay } from '../../qmp/index.ts';
import { PageSet } from '../condensed/page-set.ts';
import { type PageRun, Rebuilder, type Unpacked, unpack } from '../condensed/rebuilder.ts';
import { DiskManifest } from './disk-manifest.ts';
import { partOf } from './division.ts';
import { Merger } from './merger.ts';

/** What lies under the VM's own overlay, here: it is read and written by whoever has it open. */
export interface Below {
  client: Pick<NbdClient, 'read' | 'write' | 'writeZeroes' | 'flush'>;
  /** Resolves when all that was written is in the file, and nobody holds it any more. */
  close: () => Promise<void>;
}

export interface ArrivingDiskOptions {
  sizeBytes: number;
  openBelow: (signal: AbortSignal) => Promise<Below>;
  /** Reads it when nobody writes it any more. */
  openWhole: () => Promise<{ read(offset: number, into: Buffer): Promise<void> } & AsyncDisposable>;
  /** A session of the division's group with the relay of this number. */
  open: (manifest: DiskManifest, relay: number) => Promise<Duplex>;
  onLost: (message: string) => void;
}

const retryMs = 200;
/** Who writes it is gone, or has not come. */
const lostCodes = ['peer_unreachable', 'qemu_failed', 'timeout'];

export class ArrivingDisk implements Backend, AsyncDisposable {
  readonly sizeBytes: number;
  readonly isReadOnly = true;
  readonly #options: ArrivingDiskOptions;
  readonly #abort = new AbortController();
  /** Blocks that relays have and that are not here. */
  readonly #missing: PageSet;
  readonly #rebuilder: Rebuilder;
  #below: Promise<Below> | undefined;
  /** Who writes it lets it go, for all of it is here. */
  #closing: Promise<void> | undefined;
  #whole: Awaited<ReturnType<ArrivingDiskOptions['openWhole']>> | undefined;
  #manifest: DiskManifest | undefined;
  #merger: Merger | undefined;
  /** Parts that are on their way for a guest. */
  readonly #asked = new Set<string>();
  #turn: Promise<unknown> = Promise.resolve();
  #change = Promise.withResolvers<void>();

  constructor(options: ArrivingDiskOptions) {
    this.#options = options;
    this.sizeBytes = options.sizeBytes;
    const blocks = Math.ceil(options.sizeBytes / blockBytes);
    this.#missing = new PageSet(blocks);
    this.#rebuilder = new Rebuilder({ pages: blocks, sets: [], memory: undefined });
  }

  /** What was fetched, and sealed bytes of all that is to be; once it is known where that is. */
  get merge(): { statistics: MergeStatistics; totalBytes: number } | undefined {
    if (!this.#merger) return undefined;
    return { statistics: this.#merger.statistics, totalBytes: this.#manifest!.sealedBytes };
  }

  /** Before this only what was here at first is read. What the manifest learns later holds, too. */
  begin(manifest: DiskManifest): void {
    if (this.#manifest) return;
    this.#manifest = manifest;
    this.#addMissing(manifest);
    this.#merger = new Merger({
      manifest,
      open: (relay) => this.#options.open(manifest, relay),
      missing: this.#missing,
      place: async (body, slab) => {
        const unpacked = await unpack(body);
        await this.#inTurn(() => this.#place(unpacked, slab));
      },
      placeZeroes: () => Promise.reject(new Error('Bug: a disk is told without zeroes')),
      onLost: this.#options.onLost,
    });
    // They keep what they hold as long as somebody is there for it.
    this.#merger.attach();
  }

  /** What is left to know when all of it is here: who may forget it. */
  withoutSlabs(): Buffer {
    const { division, layout } = this.#manifest!;
    return new DiskManifest(division, layout).toBytes();
  }

  /** Resolves when all of it is here, on the disk, and nobody writes it any more. */
  async fetchAll(): Promise<void> {
    const { signal } = this.#abort;
    while (!this.#whole) {
      await this.#merger!.run();
      await this.#turn;
      signal.throwIfAborted();
      if (this.#missing.size > 0) continue;
      await this.#withBelow((below) => this.#flush(below));
      if (this.#missing.size === 0) await this.becomeWhole();
    }
  }

  async #flush({ client }: Below): Promise<void> {
    try {
      await client.flush();
    } catch (error) {
      // What a failed flush has not written, no later one writes; only where there was no room it still may.
      if (error instanceof NbdError && error.nbdCode !== 'ENOSPC') this.#lose();
      throw error;
    }
  }

  /** It is whole: from now on it is read from the file. */
  becomeWhole(): Promise<void> {
    this.#closing ??= this.#close().catch((error) => {
      this.#closing = undefined;
      throw error;
    });
    return this.#closing;
  }

  async #close(): Promise<void> {
    const closing = this.#below;
    // What was flushed stays: should the file not open now, it is read from whoever opens it next.
    this.#below = undefined;
    const below = await closing?.catch(() => undefined);
    await below?.close();
    this.#whole = await this.#options.openWhole();
    this.#changed();
  }

  /** `drop`: relays may forget it. */
  async end({ drop }: { drop: boolean }): Promise<void> {
    this.#abort.abort(new AppError('cancelled', 'The disk is not served any more'));
    this.#changed();
    await this.#merger?.end({ drop });
    await this.#turn;
    await this.#closing?.catch(() => {});
    const below = await this.#below?.catch(() => undefined);
    await below?.close();
    await this.#whole?.[Symbol.asyncDispose]();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.end({ drop: false });
  }

  async read(offset: number, lengthBytes: number): Promise<Buffer> {
    const bytes = await this.#withBelow(async ({ client }) => {
      // Each time anew: with whoever had it open what was here may be lost.
      await this.#here(offset, lengthBytes);
      return client.read(offset, lengthBytes);
    });
    if (bytes) return bytes;
    const into = Buffer.alloc(lengthBytes);
    await this.#whole!.read(offset, into);
    return into;
  }

  // It is read-only: the server asks for none of these.
  async write(): Promise<void> {}
  async writeZeroes(): Promise<void> {}
  async trim(): Promise<void> {}
  async flush(): Promise<void> {}

  // ---

  #addMissing(manifest: DiskManifest): void {
    for (const { runs } of manifest.slabs)
      for (const [first, count] of runs) this.#missing.addRange(first, count);
  }

  /** Resolves when these bytes are here. */
  async #here(offset: number, lengthBytes: number): Promise<void> {
    const first = Math.floor(offset / blockBytes);
    const end = Math.ceil((offset + lengthBytes) / blockBytes);
    const mine = new Set<string>();
    try {
      for (;;) {
        this.#abort.signal.throwIfAborted();
        const change = this.#change.promise;
        const block = this.#missing.next(first);
        if (block < 0 || block >= end) return;
        this.#want(block, end, mine);
        await change;
      }
    } finally {
      for (const part of mine) this.#asked.delete(part);
    }
  }

  #want(from: number, end: number, mine: Set<string>): void {
    const manifest = this.#manifest!;
    for (let block = from; block >= 0 && block < end; block = this.#missing.next(block + 1)) {
      const { slab } = manifest.whereIs(block)!;
      const part = `${slab.slab} ${partOf(slab, block, manifest.division.partPages)}`;
      if (this.#asked.has(part)) continue;
      this.#asked.add(part);
      mine.add(part);
      this.#merger!.want(block);
    }
  }

  #inTurn(work: () => Promise<void>): Promise<void> {
    const turn = this.#turn.then(work);
    this.#turn = turn.catch(() => {});
    return turn;
  }

  async #place(body: Unpacked, slab: number): Promise<void> {
    const { runs, missed } = await this.#rebuilder.rebuild(body);
    if (missed.length > 0)
      throw new AppError('not_found', `Slab ${slab} refers to what is not in it`, { kind: 'slab' });
    try {
      await Promise.all(this.#lacking(runs, slab).map((run) => this.#write(run)));
    } catch (error) {
      if (!(error instanceof NbdError)) throw error;
      // Then it is told, and tried again after a while.
      const code = error.nbdCode === 'ENOSPC' ? 'insufficient_space' : 'qemu_failed';
      throw new AppError(code, `Slab ${slab} cannot be written here: ${error.message}`, {});
    }
    this.#changed();
  }

  /** Of these, what is right and not here yet. */
  #lacking(runs: readonly PageRun[], slab: number): PageRun[] {
    const manifest = this.#manifest!;
    return runs.flatMap(({ page, count, content }) => {
      const lacking: PageRun[] = [];
      for (let block = page; block < page + count; block += 1) {
        if (!this.#missing.has(block) || !manifest.isGood(block, slab)) continue;
        const at = (block - page) * blockBytes;
        const last = lacking.at(-1);
        const bytes = content?.subarray(at, at + blockBytes);
        const isZero = !bytes || isZeroBlock(bytes);
        const isNext = last && last.page + last.count === block && (last.content === undefined) === isZero;
        if (!isNext) lacking.push({ page: block, count: 1, content: isZero ? undefined : bytes });
        else {
          last.count += 1;
          if (last.content)
            last.content = content!.subarray((last.page - page) * blockBytes, at + blockBytes);
        }
      }
      return lacking;
    });
  }

  async #write({ page, count, content }: PageRun): Promise<void> {
    const offset = page * blockBytes;
    const lengthBytes = Math.min(count * blockBytes, this.sizeBytes - offset);
    await this.#withBelow(async ({ client }) => {
      await (content
        ? client.write(offset, content.subarray(0, lengthBytes))
        : client.writeZeroes(offset, lengthBytes));
      for (let block = page; block < page + count; block += 1) this.#missing.delete(block);
    });
  }

  /** With who has it open now; `undefined` when it is whole, and in nobody's hands. */
  async #withBelow<Result>(work: (below: Below) => Promise<Result>): Promise<Result | undefined> {
    const { signal } = this.#abort;
    for (;;) {
      signal.throwIfAborted();
      await this.#closing?.catch(() => {});
      if (this.#whole) return undefined;
      this.#below ??= this.#options.openBelow(signal);
      const opening = this.#below;
      try {
        return await work(await opening);
      } catch (error) {
        if (!lostCodes.includes(asAppError(error).code)) throw error;
        if (this.#closing) continue;
        if (this.#below === opening) this.#lose();
        await delay(retryMs, signal);
      }
    }
  }

  /** Nobody knows what of the last writes is in the file: all of it is fetched again. */
  #lose(): void {
    const lost = this.#below;
    this.#below = undefined;
    void lost?.then((below) => below.close()).catch(() => {});
    this.#asked.clear();
    if (this.#manifest) this.#addMissing(this.#manifest);
    this.#changed();
  }

  #changed(): void {
    this.#change.resolve();
    this.#change = Promise.withResolvers();
  }
}
