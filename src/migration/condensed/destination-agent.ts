/**
 * Stands at the destination between the link and QEMU, and writes the stream that this QEMU needs: an ordinary
 * pre-copy, or a post-copy that the source QEMU knows nothing of.
 *
 *   filling   pages as they come, past the stream where that may be (`placed-pages.ts`)
 *   whole     (pre-copy) the tail is here and no page is missing: QEMU gets it, and its stream ends
 *   lacking   (post-copy) QEMU got the devices while pages are missing. Each is written exactly once, for QEMU takes a
 *             second one amiss; one that it asks for is asked for at the source
 *
 * A page that could not be made out of a batch is missing too: it is asked for again, whole. In pre-copy the tail
 * waits for it; in post-copy nothing waits.
 *
 * Relayed: the source says of more and more of what is missing where it is, and a merger fetches it from there. When
 * that is known of all of it and written down, nothing depends on the source any more.
 */
import type { Duplex } from 'node:stream';
import { promisify } from 'node:util';
import { zstdCompress, zstdDecompress } from 'node:zlib';
import { AppError } from '../../model/errors.ts';
import type { MergeStatistics } from '../../model/migration.ts';
import {
  type BlockReader,
  type BoundedReader,
  digestBlocks,
  digestBytes,
  type SetName,
} from '../../pages/index.ts';
import {
  askReceivedBitmap,
  type BlockTable,
  devicesOf,
  discard,
  eof,
  openReturnPath,
  pageBytes,
  ping,
  postcopyAdvise,
  postcopyPackage,
  postcopyResume,
  renameSection,
  startSection,
} from '../../stream/index.ts';
import { parseDivision, type Run } from '../relayed/division.ts';
import { Manifest } from '../relayed/manifest.ts';
import { MemoryMerging, type Merging } from '../relayed/memory-merging.ts';
import { framesOf } from './frame-stream.ts';
import { agentError, encodeFrame, encodeJson, frame, maxFrameBytes, protocolVersion } from './frames.ts';
import type { GuestRam, WritableRam } from './guest-memory.ts';
import { type Hello, type Layout, parseHello, parseLayout } from './handshake.ts';
import { PageFeed } from './page-feed.ts';
import { PageSet } from './page-set.ts';
import { PlacedPages } from './placed-pages.ts';
import { QemuAnswers } from './qemu-answers.ts';
import {
  isSqueezed,
  openSet,
  type PageRun,
  Rebuilder,
  type Rebuilt,
  type Unpacked,
  unpack,
} from './rebuilder.ts';

const compress = promisify(zstdCompress);
const decompress = promisify(zstdDecompress);

/** Batches that are unpacked at once: one while another one is taken, and one more. */
const mostUnpacking = 3;

/** The ping behind the devices: its answer says that they are loaded. */
const lastPing = 3;
/** The one behind the table of blocks: QEMU has emptied its memory. */
const emptyPing = 4;

export interface DestinationAgentOptions {
  /** A socket on which QEMU listens. */
  qemu: Duplex;
  /** `undefined` only when it goes on from a manifest. */
  link: Duplex | undefined;
  /** `undefined` when it cannot be read: then the source refers to nothing that this QEMU has got. */
  memory: GuestRam | undefined;
  /** Pages may be put there past QEMU's stream. */
  placing?: Placing | undefined;
  /** Of a post-copy that goes on: what an earlier agent has given to `placing.keep`. */
  missingBefore?: Buffer | undefined;
  /** Reference sets that this cloudlet holds. */
  sets: readonly SetName[];
  /** They are the agent's to dispose of. `undefined` for one that is not sound any more. */
  openReader: (name: SetName) => Promise<BlockReader | undefined>;
  /** For its storage to answer; a few seconds if missing. */
  setTimeoutMs?: number;
  /**
   * The source keeps the memory of the VM: these are the digests of its pages (32 bytes each, zeroes for pages of
   * zeroes), by the numbers that both ends have for them. Called when all of it is here.
   */
  remember?: ((digests: Buffer) => void) | undefined;
  /** Missing where nothing is relayed. */
  merging?: Merging | undefined;
  /** What goes on, for those who look where time goes. */
  onStep?: (step: string) => void;
}

export interface Placing {
  memory: WritableRam;
  /** The bitmap of the pages that are missing when the VM begins to run; when this resolves, it outlives the daemon. */
  keep: (missing: Buffer) => Promise<void>;
}

export class DestinationAgent {
  readonly #options: DestinationAgentOptions;
  readonly #readers: BoundedReader[] = [];
  /** What is of no use when this has ended. */
  readonly #ended = new AsyncDisposableStack();
  #hello: Hello | undefined;
  #opening: Buffer | undefined;
  #table: BlockTable | undefined;
  #feed: PageFeed | undefined;
  #rebuilder: Rebuilder | undefined;
  #answers: QemuAnswers | undefined;
  #state: 'filling' | 'lacking' | 'done' = 'filling';
  /** Filling: what must come again. Lacking: what is yet to come. */
  #missing = new PageSet(0);
  #asked = new PageSet(0);
  #tail: Buffer | undefined;
  #unpacking = 0;
  readonly #broken = Promise.withResolvers<never>();
  /** Of what came, if it is to be remembered. */
  #digests: Buffer | undefined;
  #placed: PlacedPages | undefined;
  /** Pages that came past the stream are not known to QEMU. Those that its stream has brought since the VM runs: */
  #given: PageSet | undefined;
  #layout: Layout | undefined;
  /** What writes to QEMU does so in its turn. */
  #turn: Promise<unknown> = Promise.resolve();
  /** Of what is with relays, since the source speaks of them. */
  #relayed: MemoryMerging | undefined;
  #isPlain = false;

  constructor(options: DestinationAgentOptions) {
    this.#options = options;
  }

  get mergeStatistics(): MergeStatistics | undefined {
    return this.#relayed?.statistics;
  }

  /** Resolves when QEMU has got all that it needs. Whatever breaks it, link and socket are destroyed. */
  async run(): Promise<void> {
    const { link, qemu } = this.#options;
    const broken = this.#broken;
    broken.promise.catch(() => {});
    qemu.on('error', broken.reject);
    // It may break when nobody reads or writes it any more.
    link?.on('error', (error) => this.#relayed?.isDivided || broken.reject(error));
    qemu.on('close', () => {
      if (this.#state !== 'done') broken.reject(new Error('QEMU closed its stream'));
    });
    qemu.on('data', (bytes: Buffer) => {
      try {
        this.#answers?.take(bytes);
      } catch (error) {
        broken.reject(error);
      }
    });
    try {
      await Promise.race([link ? this.#run(link) : this.#mergeAlone(), broken.promise]);
      qemu.end();
    } catch (error) {
      link?.destroy();
      qemu.destroy();
      throw error;
    } finally {
      await this.#relayed?.end({ drop: this.#state === 'done' });
      await this.#ended.disposeAsync();
    }
  }

  async #run(link: Duplex): Promise<void> {
    const { sets, memory } = this.#options;
    link.write(encodeJson(frame.offer, { version: protocolVersion, sets, reads: memory !== undefined }));
    try {
      await this.#follow(link);
    } catch (error) {
      // A source that has left need not say good-bye.
      if (!this.#relayed?.isDivided) throw error;
    }
    if (this.#relayed?.isDivided) await this.#relayed.merged;
    // The last of it may still be on its way to QEMU.
    await this.#turn;
    if (this.#state !== 'done' && !this.#isPlain) throw agentError('its end before the stream was whole');
  }

  async #follow(link: Duplex): Promise<void> {
    for await (const { type, body } of framesOf(link)) {
      if (type !== frame.batch) await this.#turn;
      if (this.#state === 'done') continue;
      if (type === frame.mark && this.#hello) {
        const number = Buffer.from(body);
        await this.#placed?.whole();
        link.write(encodeFrame(frame.marked, number));
      } else if (type === frame.hello && !this.#hello) await this.#open(parseHello(body));
      else if (!this.#hello) throw agentError(`a frame of type ${type} before its hello`);
      else if (type === frame.rest && !this.#table) await this.#rest(body);
      else if (type === frame.opening && !this.#opening) this.#opening = Buffer.from(body);
      else if (type === frame.blocks && !this.#table) await this.#begin(body);
      else if (!this.#table || !this.#feed) throw agentError(`a frame of type ${type} before its blocks`);
      else if (type === frame.batch) await this.#takeInTurn(body);
      else if (type === frame.command && !this.#tail)
        await this.#inTurn(() => this.#feed!.between(Buffer.from(body)));
      else if (type === frame.tail && !this.#tail) await this.#inTurn(() => this.#takeTail(body));
      else if (type === frame.division && !this.#relayed)
        this.#beginMerging(new Manifest(parseDivision(body), this.#layout!));
      else if (this.#relayed) {
        this.#relayed.learn(type, body);
        await this.#perhapsDivided();
      } else throw agentError(`a frame of type ${type} out of place`);
    }
  }

  #inTurn<Result>(work: () => Promise<Result>): Promise<Result> {
    const turn = this.#turn.then(work);
    this.#turn = turn.catch(() => {});
    return turn;
  }

  async #open(hello: Hello): Promise<void> {
    const { sets, openReader, setTimeoutMs } = this.#options;
    this.#hello = hello;
    for (const name of hello.sets) {
      if (!sets.includes(name)) throw agentError(`a set that was not offered: ${name}`);
      this.#readers.push(this.#ended.use(await openSet(name, openReader, setTimeoutMs)));
    }
  }

  /** A stream that the source does not understand goes to QEMU as it is. */
  async #rest(body: Buffer): Promise<void> {
    this.#isPlain = true;
    const { qemu } = this.#options;
    const bytes = Buffer.from(body);
    await new Promise<void>((resolve, reject) => {
      qemu.write(bytes, (error) => (error ? reject(error) : resolve()));
    });
  }

  async #begin(body: Buffer): Promise<void> {
    const { mode } = this.#hello!;
    const layout = parseLayout(body);
    this.#prepare(layout);
    const { sectionId, table } = layout;
    if (mode === 'resume') return this.#inTurn(() => this.#resume(table, sectionId));
    if (this.#hello!.keeps && this.#options.remember) this.#digests = Buffer.alloc(table.pages * digestBytes);
    if (!this.#opening) throw agentError('blocks before the opening');
    await this.#feed!.write(this.#opening);
    if (mode === 'postcopy')
      await this.#feed!.write(Buffer.concat([openReturnPath(), ping(1), postcopyAdvise()]));
    await this.#feed!.write(startSection(sectionId, table));
    if (mode === 'postcopy' && this.#options.placing) await this.#beginToPlace(this.#options.placing, table);
  }

  /** Only in a memory that QEMU has emptied is a page of zeroes nothing to write. */
  async #beginToPlace({ memory }: Placing, table: BlockTable): Promise<void> {
    try {
      memory.use(table);
      // Its thread starts while QEMU empties its memory.
      const placed = new PlacedPages(memory.writerOf(this.#rebuilder!.made), table.pages);
      this.#ended.use(placed);
      const emptied = this.#answers!.pong(emptyPing);
      await this.#feed!.between(ping(emptyPing));
      await emptied;
      await placed.begin();
      this.#placed = placed;
    } catch (error) {
      // Then all of it goes through the stream.
      if (!(error instanceof AppError)) throw error;
    }
  }

  #prepare({ sectionId, table }: Layout): void {
    const { qemu, memory } = this.#options;
    memory?.use(table);
    this.#layout = { sectionId, table };
    this.#table = table;
    this.#missing = new PageSet(table.pages);
    this.#asked = new PageSet(table.pages);
    this.#answers = new QemuAnswers(table, (pages) => this.#request(pages));
    this.#rebuilder = new Rebuilder({ pages: table.pages, sets: this.#readers, memory });
    this.#feed = new PageFeed(qemu, sectionId, table);
  }

  /** Batches are unpacked side by side, a few of them, and taken one after the other. */
  async #takeInTurn(body: Buffer): Promise<void> {
    const isSlow = isSqueezed(body);
    const unpacked = unpack(isSlow ? Buffer.from(body) : body);
    // Waited for in its turn.
    unpacked.catch(() => {});
    const before = this.#turn;
    this.#unpacking += 1;
    const taken = this.#inTurn(async () => this.#take(await unpacked)).finally(() => {
      this.#unpacking -= 1;
    });
    taken.catch(this.#broken.reject);
    if (!isSlow) await taken;
    if (this.#unpacking >= mostUnpacking) await before;
  }

  async #take(batch: Unpacked): Promise<void> {
    await this.#place(await this.#rebuilder!.rebuild(batch));
  }

  async #place({ runs, missed, lost }: Rebuilt): Promise<void> {
    if (lost.length > 0) this.#options.link?.write(encodeFrame(frame.lost, Buffer.from(lost)));
    this.#note(runs);
    if (this.#state === 'filling') {
      for (const { page, count } of runs)
        for (let each = page; each < page + count; each++) this.#missing.delete(each);
      if (this.#placed) await this.#placed.take(runs);
      else await this.#feed!.pages(runs);
      for (const page of missed) this.#missing.add(page);
    } else {
      await this.#feed!.pages(this.#onlyMissing(runs));
    }
    if (missed.length > 0) this.#ask(missed, true);
    await this.#perhapsFinish();
    await this.#perhapsDivided();
  }

  #note(runs: readonly PageRun[]): void {
    const digests = this.#digests;
    if (!digests) return;
    for (const { page, count, content } of runs) {
      if (content) digestBlocks(content).copy(digests, page * digestBytes);
      else digests.fill(0, page * digestBytes, (page + count) * digestBytes);
    }
  }

  /** Each page once. */
  #onlyMissing(runs: readonly PageRun[]): PageRun[] {
    const wanted: PageRun[] = [];
    for (const { page, count, content } of runs)
      for (const [first, some] of this.#missing.runs(page, page + count)) {
        const from = (first - page) * pageBytes;
        wanted.push({ page: first, count: some, content: content?.subarray(from, from + some * pageBytes) });
        for (let each = first; each < first + some; each++) this.#missing.delete(each);
        this.#given?.addRange(first, some);
      }
    return wanted;
  }

  async #takeTail(body: Buffer): Promise<void> {
    if (body.length < 8) throw agentError('a tail without sizes');
    const tailBytes = body.readUInt32BE(0);
    const pendingBytes = body.readUInt32BE(4);
    const wanted = Math.ceil(this.#table!.pages / 32) * 4;
    if (tailBytes > maxFrameBytes || (pendingBytes !== 0 && pendingBytes !== wanted))
      throw agentError(`a tail of ${tailBytes} bytes with ${pendingBytes} of pending pages`);
    const bytes = await decompress(body.subarray(8), { maxOutputLength: tailBytes + pendingBytes + 1 });
    if (bytes.length !== tailBytes + pendingBytes) throw agentError('a tail of another size');
    this.#tail = bytes.subarray(0, tailBytes);
    this.#options.onStep?.('tail');
    if (pendingBytes > 0)
      this.#missing.addAll(PageSet.fromBytes(this.#table!.pages, bytes.subarray(tailBytes)));
    if (this.#hello!.mode === 'postcopy' && this.#missing.size > 0) await this.#switch(this.#tail);
    await this.#perhapsFinish();
  }

  /** The guest can run from here on. */
  async #switch(tail: Buffer): Promise<void> {
    const discards = this.#table!.blocks.flatMap(({ name, firstPage, pages }) => {
      const runs = this.#missing.runs(firstPage, firstPage + pages);
      return discard(
        name,
        runs.map(([first, count]) => [first - firstPage, count]),
      );
    });
    const devices = postcopyPackage(devicesOf(tail), lastPing);
    const placed = this.#placed;
    if (placed) {
      await Promise.all([placed.whole(), this.#options.placing!.keep(this.#missing.toBytes())]);
      this.#given = new PageSet(this.#table!.pages);
      // From now on pages come through the stream alone.
      this.#placed = undefined;
      void placed[Symbol.asyncDispose]();
    }
    this.#state = 'lacking';
    await this.#feed!.between(Buffer.concat([...discards, ping(2), devices]));
    this.#options.onStep?.('devices given');
  }

  async #perhapsFinish(): Promise<void> {
    if (this.#state === 'done') return;
    const isOver = this.#missing.size === 0 && (this.#state === 'lacking' || this.#tail !== undefined);
    if (!isOver) return;
    const feed = this.#feed!;
    await this.#placed?.whole();
    await feed.end();
    await feed.write(this.#state === 'lacking' ? eof() : this.#tail!);
    this.#state = 'done';
    this.#options.link?.end();
    if (this.#digests) this.#options.remember!(this.#digests);
  }

  /** QEMU asks for pages: page faults of the guest, mostly. */
  #request(pages: readonly number[]): void {
    this.#want(pages.filter((page) => this.#missing.has(page)));
    for (const page of pages) if (!this.#missing.has(page)) this.#giveZeroes(page);
  }

  /** Pages that are missing, each asked for once. */
  #want(pages: readonly number[]): void {
    if (pages.length === 0) return;
    const wanted: number[] = [];
    for (const page of pages) {
      if (!this.#asked.add(page)) continue;
      if (!this.#relayed?.want(page)) wanted.push(page);
    }
    // Also where relays have all of it: the source pushes less while the guest asks.
    if (wanted.length > 0 || this.#relayed?.isDivided === false) this.#ask(wanted, false);
  }

  /** QEMU does not have it, and nobody misses it, as far as is known: where a post-copy goes on, that comes first. */
  #giveZeroes(page: number): void {
    if (!this.#given || this.#given.has(page)) return;
    const giving = this.#inTurn(async () => {
      if (this.#state !== 'lacking') return;
      if (this.#missing.has(page)) this.#want([page]);
      else if (this.#given!.add(page)) await this.#feed!.pages([{ page, count: 1, content: undefined }]);
    });
    giving.catch(this.#broken.reject);
  }

  #ask(pages: readonly number[], plain: boolean): void {
    // The link has ended, and whatever this is about has come.
    if (this.#state === 'done') return;
    const body = Buffer.alloc(1 + pages.length * 4);
    body[0] = Number(plain);
    for (const [index, page] of pages.entries()) body.writeUInt32BE(page, 1 + index * 4);
    this.#options.link?.write(encodeFrame(frame.want, body));
  }

  /** A post-copy goes on: QEMU says what it has, and the source is told what it lacks. */
  async #resume(table: BlockTable, sectionId: number): Promise<void> {
    const missing = this.#missing;
    const { missingBefore } = this.#options;
    const before = missingBefore && PageSet.fromBytes(table.pages, missingBefore);
    if (before) this.#given = new PageSet(table.pages);
    for (const [index, { name, firstPage, pages }] of table.blocks.entries()) {
      const received = this.#answers!.received(index);
      await this.#feed!.between(askReceivedBitmap(name));
      const bits = await received;
      for (let page = 0; page < pages; page++) {
        const isMissing = !(bits[page >>> 3]! & (1 << (page & 7)));
        if (isMissing && before?.has(firstPage + page) !== false) missing.add(firstPage + page);
      }
    }
    const goesOn = this.#answers!.goesOn();
    await this.#feed!.between(postcopyResume());
    await goesOn;
    await this.#feed!.between(renameSection(sectionId));
    this.#state = 'lacking';
    this.#options.link?.write(encodeFrame(frame.missing, await compress(missing.toBytes())));
    await this.#perhapsFinish();
  }

  /** From now on the source says what relays hold. */
  #beginMerging(manifest: Manifest): void {
    const { merging } = this.#options;
    if (!merging || this.#hello?.mode === 'precopy') throw agentError('a division that was not agreed on');
    this.#relayed = new MemoryMerging({
      merging,
      manifest,
      missing: this.#missing,
      asked: this.#asked,
      rebuilder: this.#rebuilder!,
      place: (rebuilt) => this.#place(rebuilt),
      placeZeroes: (runs) => this.#takeZeroes(runs),
      inTurn: (work) => this.#inTurn(work),
      wholeStream: () =>
        this.#opening && this.#tail ? { opening: this.#opening, tail: this.#tail } : undefined,
      isDone: () => this.#state === 'done',
      onBroken: this.#broken.reject,
    });
  }

  async #perhapsDivided(): Promise<void> {
    if (this.#state === 'lacking') await this.#relayed?.perhapsDivided();
  }

  async #takeZeroes(runs: readonly Run[]): Promise<void> {
    const zeroes = runs.map(([page, count]) => ({ page, count, content: undefined }));
    await this.#feed!.pages(this.#onlyMissing(zeroes));
    await this.#perhapsFinish();
  }

  /** Goes on from a manifest: QEMU says what it has, and the rest is fetched from relays. */
  async #mergeAlone(): Promise<void> {
    const manifest = this.#options.merging!.manifest!;
    const { sectionId, table } = manifest.layout;
    this.#prepare(manifest.layout);
    await this.#inTurn(() => this.#resume(table, sectionId));
    if (this.#state === 'done') return;
    this.#beginMerging(manifest);
    this.#relayed!.goOn();
    await this.#relayed!.merged;
    await this.#turn;
  }
}
