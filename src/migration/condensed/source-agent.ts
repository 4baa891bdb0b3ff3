/**
 * Stands at the source between QEMU and the link. QEMU runs an ordinary pre-copy into it.
 *
 *   copying   each page that QEMU writes goes out, condensed; a slow link holds QEMU back, so that its own estimate of
 *             the bandwidth stays true
 *   draining  (post-copy) QEMU's pages are only noted as *pending*, at full speed, so it converges whatever the guest
 *             does; what they contain is read later from the memory of the VM, which stands still then
 *   serving   QEMU is done. Pending pages follow, those first that the destination asks for
 *
 * Reading a page later than QEMU did is safe at any time: QEMU clears its dirty bit before it reads it.
 * Because the source QEMU knows nothing of post-copy, it can let the VM run again as long as nobody else did.
 */
import type { Duplex, Readable } from 'node:stream';
import { promisify } from 'node:util';
import { zstdCompress, zstdDecompress } from 'node:zlib';
import type { SessionStats } from '../../link/index.ts';
import type { EngineStatistics } from '../../model/migration.ts';
import { KiB } from '../../model/units.ts';
import { isZeroBlock, type SetIndex, type SetName } from '../../pages/index.ts';
import { delay } from '../../qmp/index.ts';
import { type BlockTable, commandBytes, pageBytes, StreamParser } from '../../stream/index.ts';
import type { CompressionMode } from './compression.ts';
import { Condenser } from './condenser.ts';
import { framesOf } from './frame-stream.ts';
import { agentError, encodeFrame, encodeJson, frame, protocolVersion } from './frames.ts';
import type { GuestRam } from './guest-memory.ts';
import { type AgentMode, parseOffer } from './handshake.ts';
import { Outbox } from './outbox.ts';
import { PageBatch } from './page-batch.ts';
import { PageSet } from './page-set.ts';

export interface SourceAgentOptions {
  /** QEMU's stream; missing when a post-copy is resumed, for which the memory alone is needed. */
  qemu: Readable | undefined;
  link: Duplex;
  /** `undefined` when it cannot be read: then nothing but whole pages travels, and only in pre-copy. */
  memory: GuestRam | undefined;
  mode: AgentMode;
  /** Opens the indexes of sets; `undefined` for those that are not known here. They are the agent's to dispose of. */
  openIndex: (name: SetName) => Promise<SetIndex | undefined>;
  /** Not even a first pass: every page is pending from the beginning. */
  drainAtOnce?: boolean;
  /** The memory of the VM will stay behind when it has left. */
  keeps?: boolean;
  limitBps: () => number | undefined;
  compression?: CompressionMode;
  statistics: EngineStatistics;
}

const compress = promisify(zstdCompress);
const decompress = promisify(zstdDecompress);

/** Pushed at once while the guest waits for others: short, so that what it asks for is not long in coming. */
const pushPages = 64;
/** A link may always have so much under way, however slow it seems. */
const leastInFlightBytes = 256 * KiB;
const shallowPollMs = 2;
/** With a page that is asked for come those behind it, which a guest mostly wants next. */
const prefetchPages = 16;
/** QEMU numbers sections from 0; this is none of them, and what the number of RAM was nobody needs to remember. */
const resumedSectionId = 0x7fff_ffff;
/** Requests that may wait; a destination asks for each page once. */
const mostWants = 65_536;

export class SourceAgent {
  readonly #options: SourceAgentOptions;
  readonly #abort = new AbortController();
  readonly #outbox: Outbox;
  readonly #spare: PageBatch[] = [];
  readonly #wants: { page: number; plain: boolean }[] = [];
  readonly #sets: SetIndex[] = [];
  /** The stream so far, until the table of blocks was in it: up to there it can go on as it is. */
  #preamble: Buffer[] | undefined = [];
  #state: 'copying' | 'draining' | 'serving' = 'copying';
  #opening: Buffer = Buffer.alloc(0);
  #tail: Buffer[] = [];
  #batch = new PageBatch();
  #table: BlockTable | undefined;
  #sectionId = 0;
  #condenser: Condenser | undefined;
  #pending = new PageSet(0);
  /** Pages that QEMU has not written even once. */
  #unseen = new PageSet(0);
  #nextPush = 0;
  #isEnded = false;
  #wake = Promise.withResolvers<void>();

  /** By an agent whose work this one goes on with. */
  readonly #sentBefore: number;

  constructor(options: SourceAgentOptions) {
    this.#options = options;
    this.#sentBefore = options.statistics.wireBytes;
    const { link, limitBps } = options;
    this.#outbox = new Outbox({ link, signal: this.#abort.signal, limitBps });
    if (options.drainAtOnce) this.drain();
  }

  get statistics(): EngineStatistics {
    const { statistics } = this.#options;
    statistics.wireBytes = this.#sentBefore + this.#outbox.sentBytes;
    return statistics;
  }

  /** From now on pages are pending. Without access to the VM's memory it goes on as before. */
  drain(): void {
    if (this.#state !== 'copying' || !this.#options.memory || this.#options.mode === 'precopy') return;
    this.#state = 'draining';
  }

  /** Resolves when the destination needs nothing any more. Whatever breaks it, it destroys the link. */
  async run(): Promise<void> {
    const { link } = this.#options;
    try {
      await Promise.race([this.#run(), this.#outbox.failed]);
      link.end();
    } catch (error) {
      link.destroy();
      throw error;
    } finally {
      this.#abort.abort();
      this.#options.qemu?.destroy();
      for (const set of this.#sets) await set[Symbol.asyncDispose]();
    }
  }

  async #run(): Promise<void> {
    const frames = framesOf(this.#options.link);
    const first = await frames.next();
    if (first.done || first.value.type !== frame.offer) throw agentError('no offer');
    await this.#hello(parseOffer(first.value.body));
    if (this.#options.qemu) {
      const listening = this.#listen(frames);
      await Promise.race([this.#copy(this.#options.qemu), listening.then(() => this.#endedEarly())]);
      await Promise.all([this.#serve(), listening]);
    } else {
      await this.#resume(frames);
      await Promise.all([this.#serve(), this.#listen(frames)]);
    }
  }

  async #hello({ sets, reads }: { sets: SetName[]; reads: boolean }): Promise<void> {
    const { mode, memory, openIndex, keeps = false } = this.#options;
    const chosen: SetName[] = [];
    // A reference that fails is healed out of the memory.
    for (const name of memory ? sets : []) {
      const index = await openIndex(name);
      if (!index) continue;
      chosen.push(name);
      this.#sets.push(index);
    }
    this.#destinationReads = reads && memory !== undefined;
    const spoken = memory ? mode : 'precopy';
    this.#outbox.send(
      encodeJson(frame.hello, { version: protocolVersion, mode: spoken, sets: chosen, keeps }),
    );
  }
  #destinationReads = false;

  async #copy(qemu: Readable): Promise<void> {
    const parser = new StreamParser({
      opening: (bytes) => {
        this.#opening = Buffer.from(bytes);
      },
      blocks: (table) => this.#begin(table),
      sectionBegins: (_kind, id) => {
        this.#sectionId = id;
      },
      sectionEnds: (kind) => {
        if (kind === 'start') this.#sendLayout();
      },
      page: (page, buffer, at) => this.#page(page, buffer, at),
      zeroPage: (page) => this.#zeroPage(page),
      command: (code, payload) => {
        this.#flush();
        this.#outbox.send(encodeFrame(frame.command, commandBytes(code, payload)));
      },
      tail: (bytes) => this.#tail.push(Buffer.from(bytes)),
    });
    let isPlain = false;
    for await (const bytes of qemu) {
      if (isPlain) this.#outbox.send(encodeFrame(frame.rest, bytes));
      else isPlain = this.#parse(parser, bytes);
      if (!this.#batch.isEmpty && this.#outbox.isIdle) this.#flush();
      if (!this.#outbox.hasRoom) await this.#outbox.room();
    }
    if (isPlain) return;
    parser.end();
    await this.#sendTail();
  }

  /** True when the stream goes on as it is, since it holds what we do not know. */
  #parse(parser: StreamParser, bytes: Buffer): boolean {
    this.#preamble?.push(bytes);
    try {
      parser.push(bytes);
      return false;
    } catch (error) {
      if (!this.#preamble) throw error;
      this.#options.statistics.fallback = (error as Error).message;
      this.#outbox.send(encodeFrame(frame.rest, ...this.#preamble));
      return true;
    }
  }

  #begin(table: BlockTable): void {
    const { memory, compression, statistics } = this.#options;
    memory?.use(table);
    this.#table = table;
    this.#pending = new PageSet(table.pages);
    this.#unseen = new PageSet(table.pages);
    this.#unseen.addRange(0, table.pages);
    this.#condenser = new Condenser({
      pages: table.pages,
      sets: this.#sets,
      destinationReads: this.#destinationReads,
      ...(compression && { compression }),
      linkSpeed: () => this.#outbox.speed,
      statistics,
    });
  }

  #sendLayout(): void {
    this.#preamble = undefined;
    const blocks = this.#table!.blocks.map(({ name, sizeBytes }) => ({ name, sizeBytes }));
    if (this.#opening.length > 0) this.#outbox.send(encodeFrame(frame.opening, this.#opening));
    this.#outbox.send(encodeJson(frame.blocks, { sectionId: this.#sectionId, blocks }));
  }

  #page(page: number, buffer: Buffer, at: number): void {
    this.#unseen.delete(page);
    if (this.#state !== 'copying') {
      this.#pending.add(page);
      return;
    }
    this.#batch.addPage(page, buffer, at);
    if (this.#batch.isFull) this.#flush();
  }

  #zeroPage(page: number): void {
    this.#unseen.delete(page);
    if (this.#state !== 'copying') {
      this.#pending.add(page);
      return;
    }
    this.#batch.addZero(page);
    if (this.#batch.isFull) this.#flush();
  }

  #flush(): void {
    if (this.#batch.isEmpty) return;
    this.#dispatch(this.#batch, false);
    this.#batch = this.#spare.pop() ?? new PageBatch();
  }

  #dispatch(batch: PageBatch, plain: boolean): void {
    const onTaken = () => {
      batch.clear();
      this.#spare.push(batch);
    };
    this.#outbox.send(this.#condenser!.condense(batch, { plain, onTaken }));
    this.#outbox.onRoom(() => {
      if (this.#outbox.isIdle && this.#state === 'copying') this.#flush();
    });
  }

  /** The state of the devices and what is still to come, in one flight. */
  async #sendTail(): Promise<void> {
    this.#flush();
    const isPostcopy = this.#state === 'draining';
    if (isPostcopy) {
      for (const [first, count] of this.#unseen.runs()) this.#pending.addRange(first, count);
      this.#condenser!.enterPostcopy();
    }
    this.#state = 'serving';
    this.#options.statistics.postcopyPages = this.#pending.size;
    const tail = Buffer.concat(this.#tail.splice(0));
    const pending = isPostcopy ? this.#pending.toBytes() : Buffer.alloc(0);
    const sizes = Buffer.alloc(8);
    sizes.writeUInt32BE(tail.length);
    sizes.writeUInt32BE(pending.length, 4);
    const packed = await compress(Buffer.concat([tail, pending]));
    this.#outbox.send(encodeFrame(frame.tail, sizes, packed));
  }

  /** Goes on where another agent, perhaps of an earlier daemon, was cut off. */
  async #resume(frames: ReturnType<typeof framesOf>): Promise<void> {
    const { memory } = this.#options;
    if (!memory) throw agentError('a wish to go on, but the memory cannot be read');
    this.#begin(memory.table());
    this.#state = 'serving';
    this.#condenser!.enterPostcopy();
    this.#sectionId = resumedSectionId;
    this.#sendLayout();
    const next = await frames.next();
    if (next.done || next.value.type !== frame.missing) throw agentError('not what is missing');
    const { pages } = this.#table!;
    const bits = await decompress(next.value.body, { maxOutputLength: pages / 8 + 64 });
    this.#pending = PageSet.fromBytes(pages, bits);
  }

  async #listen(frames: AsyncIterable<{ type: number; body: Buffer }>): Promise<void> {
    for await (const { type, body } of frames) {
      if (type !== frame.want || !this.#table) throw agentError(`a frame of type ${type}`);
      const plain = body[0] === 1;
      for (let at = 1; at + 4 <= body.length; at += 4) {
        const page = body.readUInt32BE(at);
        if (page >= this.#table.pages || this.#wants.length >= mostWants)
          throw agentError(`a request for page ${page}`);
        this.#wants.push({ page, plain });
      }
      this.#wake.resolve();
      if (this.#state !== 'serving') this.#takeWants();
    }
    this.#isEnded = true;
    this.#wake.resolve();
  }

  async #serve(): Promise<void> {
    while (!this.#isEnded) {
      if (this.#wants.length > 0) {
        this.#takeWants();
      } else if (this.#pending.size > 0) {
        this.#push();
      } else {
        await this.#wake.promise;
        this.#wake = Promise.withResolvers();
      }
      await this.#outbox.room(1);
      await this.#untilLinkIsShallow();
    }
  }

  /** What the link holds is what a page that the guest waits for stands behind: no more than keeps it busy. */
  async #untilLinkIsShallow(): Promise<void> {
    const { link } = this.#options;
    if (!('stats' in link)) return;
    while (this.#wants.length === 0 && !this.#isEnded) {
      const { unacknowledgedBytes, deliveryRateBps, rttMs } = link.stats as SessionStats;
      const inFlightBytes = ((deliveryRateBps / 8) * (rttMs ?? 0)) / 1000;
      if (unacknowledgedBytes <= Math.max(leastInFlightBytes, inFlightBytes * 1.5)) return;
      await Promise.race([delay(shallowPollMs, this.#abort.signal), this.#outbox.failed]);
    }
  }

  /** What was asked for, with what lies behind it. */
  #takeWants(): void {
    const batch = this.#spare.pop() ?? new PageBatch();
    const plain = this.#wants[0]!.plain;
    const { statistics } = this.#options;
    while (this.#wants[0]?.plain === plain && !batch.isFull && this.#wants.length > 0) {
      const { page } = this.#wants.shift()!;
      if (plain) {
        statistics.repairedPages += 1;
        this.#read(batch, page, 1);
        // While the VM runs it may change again, and then it is pending all the same.
        if (this.#state === 'serving') this.#pending.delete(page);
        continue;
      }
      statistics.requestedPages += 1;
      for (const [first, count] of this.#pending.runs(page, page + prefetchPages)) {
        this.#takePending(batch, first, count);
        if (batch.isFull) break;
      }
    }
    this.#send(batch, plain);
  }

  #push(): void {
    const batch = this.#spare.pop() ?? new PageBatch();
    for (let taken = 0; taken < pushPages && this.#pending.size > 0; ) {
      const first = this.#pending.next(this.#nextPush);
      if (first < 0) {
        this.#nextPush = 0;
        continue;
      }
      const [[, count]] = this.#pending.runs(first, first + pushPages - taken) as [[number, number]];
      this.#takePending(batch, first, count);
      this.#nextPush = first + count;
      taken += count;
    }
    this.#send(batch, false);
  }

  #takePending(batch: PageBatch, first: number, count: number): void {
    this.#read(batch, first, count);
    for (let page = first; page < first + count; page++) this.#pending.delete(page);
  }

  readonly #scratch = Buffer.alloc(pushPages * pageBytes);

  /** Pages of one block that lie one behind the other, as many as fit the scratch buffer. */
  #read(batch: PageBatch, first: number, count: number): void {
    const startedAt = performance.now();
    const table = this.#table!;
    for (let done = 0; done < count; ) {
      const block = table.blocks[table.blockOf(first + done)]!;
      const some = Math.min(count - done, pushPages, block.firstPage + block.pages - first - done);
      this.#options.memory!.read(first + done, some, this.#scratch);
      for (let index = 0; index < some; index++) {
        const page = first + done + index;
        if (isZeroBlock(this.#scratch, index * pageBytes)) batch.addZero(page);
        else batch.addPage(page, this.#scratch, index * pageBytes);
      }
      done += some;
    }
    this.#options.statistics.cpuMs.read += performance.now() - startedAt;
  }

  #send(batch: PageBatch, plain: boolean): void {
    if (batch.isEmpty) this.#spare.push(batch);
    else this.#dispatch(batch, plain);
  }

  #endedEarly(): Promise<never> {
    throw agentError('its end before ours');
  }
}
