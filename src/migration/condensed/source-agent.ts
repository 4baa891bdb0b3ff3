/**
 * Stands at the source between QEMU and the link. QEMU runs an ordinary pre-copy into it.
 *
 *   copying   each page that QEMU writes goes out, condensed; a slow link holds QEMU back, so that its own estimate of
 *             the bandwidth stays true
 *   draining  (post-copy) QEMU's pages are only noted as *pending*, so it converges whatever the guest does; what they
 *             contain is read later from the memory of the VM, which stands still then. It begins when all that was sent
 *             has left, so that nothing waits behind that; QEMU waits meanwhile, and the guest runs. When the round
 *             that was begun is over it is read slowly: each round then shows which pages the guest has written
 *             in a moment
 *   serving   QEMU is done. Pending pages follow, those first that the destination asks for
 *
 * Relayed: in `draining` each page that QEMU has written goes to relays, once, so that they are filled while the VM still
 * runs here; what it writes afterwards is *stale* there, and pending. In `serving`, what the destination does not take as
 * fast as it is read goes to relays too, and the destination is told where it is. When nothing is pending any more the
 * destination says that it does not need us.
 *
 * Reading a page later than QEMU did is safe at any time: QEMU clears its dirty bit before it reads it.
 * Because the source QEMU knows nothing of post-copy, it can let the VM run again as long as nobody else did.
 */
import type { Duplex, Readable } from 'node:stream';
import { setImmediate as nextTurn } from 'node:timers/promises';
import { promisify } from 'node:util';
import { zstdCompress, zstdDecompress } from 'node:zlib';
import type { EngineStatistics } from '../../model/migration.ts';
import { KiB, MiB } from '../../model/units.ts';
import { digestBlocks, digestBytes, isZeroBlock, type SetIndex, type SetName } from '../../pages/index.ts';
import { delay } from '../../qmp/index.ts';
import { type BlockTable, commandBytes, pageBytes, StreamParser } from '../../stream/index.ts';
import { type Divider, partPages, type SlabContent } from '../relayed/divider.ts';
import type { AlikePage, Run } from '../relayed/division.ts';
import { RelayGate } from '../relayed/relay-gate.ts';
import type { CompressionMode } from './compression.ts';
import { Condenser } from './condenser.ts';
import { type DevicePages, numbersOf } from './device-pages.ts';
import { mirroredSet } from './disk-frames.ts';
import { framesOf } from './frame-stream.ts';
import { agentError, encodeFrame, encodeJson, encodeWord, frame, protocolVersion } from './frames.ts';
import type { GuestRam } from './guest-memory.ts';
import { type AgentMode, parseOffer } from './handshake.ts';
import { isClear, isShallow, statsOf } from './in-flight.ts';
import { Outbox } from './outbox.ts';
import { PageBatch } from './page-batch.ts';
import { PageHeat } from './page-heat.ts';
import { PageSet } from './page-set.ts';
import { bytesFrom } from './qemu-bytes.ts';

export interface SourceAgentOptions {
  /** QEMU's stream; missing when a post-copy is resumed, for which the memory alone is needed. */
  qemu: Readable | undefined;
  link: Duplex;
  /** `undefined` when it cannot be read: then nothing but whole pages travels, and only in pre-copy. */
  memory: GuestRam | undefined;
  mode: AgentMode;
  /** Of a post-copy; what is not known when the VM leaves is done without. */
  devicePages?: Promise<DevicePages>;
  /** Opens the indexes of sets; `undefined` for those that are not known here. They are the agent's to dispose of. */
  openIndex: (name: SetName) => Promise<SetIndex | undefined>;
  /** Not even a first pass: every page is pending from the beginning. */
  drainAtOnce?: boolean;
  /** The memory of the VM will stay behind when it has left. */
  keeps?: boolean;
  limitBps: () => number | undefined;
  compression?: CompressionMode;
  /** With relays that are open. Missing where nothing is relayed. */
  divider?: Divider | undefined;
  /** Each page goes to relays once before the VM leaves: then it is left for what it has written meanwhile alone. */
  dividesFirst?: boolean;
  /** All pages are to be had from relays alone, also those that the destination asks for. */
  dividesAll?: boolean;
  statistics: EngineStatistics;
  /** What goes on, for those who look where time goes. */
  onStep?: (step: string, facts?: Record<string, number>) => void;
}

const compress = promisify(zstdCompress);
const decompress = promisify(zstdDecompress);

/** Pushed at once while the guest waits for others: short, so that what it asks for is not long in coming. */
const pushPages = 64;
const leastPushPages = 8;
/** Of what is pushed at once on a slow link. */
const pushMs = 20;
/** The same while the guest asks for one page after the other. */
const restlessPushMs = 5;
/** A guest that has asked for something lately is about to ask for more. */
const calmMs = 300;
const endMs = 400;
const shallowPollMs = 2;
const earlyPollMs = 5;
/** So much of the uplink may be taken for relays while the VM runs here: its last state stands behind that. */
const earlyQueueMs = 150;
/** While QEMU writes as fast as it can, relays wait: each round is over sooner, and with it the last one. */
const busyBytes = 32 * KiB;
const busyMs = 3;
/** Pages of a slab: what a guest waits for comes as a whole slab, and each has its cost. */
const slabPages = 64;
/** Pages that are looked at for one slab: most of a guest may be zero. */
const scannedPages = 512;
/** Frames that may wait for the link beside pages: where slabs are is a few bytes each. */
const mostWords = 63;
/**
 * In the first round most pages are known, and cost time but hardly bytes: what others need is made ahead, so that the link
 * has something to carry meanwhile. On 60 Mbit/s this is enough for 3 s.
 */
const mostReserveBytes = 24 * MiB;
/** So long the link may take for what changes most before the VM runs at the destination, which would ask for it at once. */
const hotMs = 80;
/** A link that never had much to carry is taken for no slower than this. */
const leastBytesPerSecond = 1e6;
/** QEMU's rounds while it is read slowly, and for how long it is. */
const sampleRoundMs = 40;
const sampleMs = 500;
/** For so long at most it goes on until what is scattered has been sent. */
const mostSampleMs = 2500;
/** At a time, so that what is too much is noticed soon. */
const hotPages = 64;
const hotBatches = 2;
/** Until a round has shown how well what changes can be condensed. */
const unknownRatio = 1;
/** With a page that is asked for come those behind it, which a guest mostly wants next. */
const prefetchPages = 16;
/** QEMU numbers sections from 0; this is none of them, and what the number of RAM was nobody needs to remember. */
const resumedSectionId = 0x7fff_ffff;
/** Requests that may wait; a destination asks for each page once. */
const mostWants = 65_536;

interface Heard {
  type: number;
  body: Buffer;
}

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
  /** By number: what waits until the destination has taken all that was sent before. */
  readonly #marks = new Map<number, () => void>();
  #lastMark = 0;
  /** The first round, which may be in many buffers when QEMU is through with it. */
  #firstRound: Promise<void> | undefined;
  #isFirstRoundTaken = false;
  #isDrainWanted = false;
  /** Since when QEMU is read slowly: from the first round that began while it drained. */
  #sampledSince: number | undefined;
  /** By the short rounds of draining. */
  #heat = new PageHeat(0);
  #isScatteredSent = false;
  #scattering: Promise<void> = Promise.resolve();
  #round = 1;
  /** Of the round before: bytes on the link for each byte of the guest. */
  #ratio = unknownRatio;
  #atRound = { guestBytes: 0, wireBytes: 0 };
  /** Pages to push first, as far as they are still pending: the hottest first. */
  #warm: number[] = [];
  #warmAt = 0;
  #isWarmDue = false;
  /** The page that the guest asked for last. */
  #lastWant = 0;
  #nextPush = 0;
  /** Relayed, while draining: pages that nobody has read yet; that relays hold; and of them those that are stale there. */
  #fresh = new PageSet(0);
  #early = new PageSet(0);
  #stale = new PageSet(0);
  #hasDivision = false;
  /** What the destination is to be told of slabs, and has not been. */
  readonly #words: Buffer[] = [];
  /** The VM has stood still: relays get nothing before it runs at the destination. */
  #isLeaving = false;
  /** When QEMU last had much to write. */
  #busyAt = Number.NEGATIVE_INFINITY;
  /** When the destination last asked for something, and what the link carried before it did. */
  #wantedAt = Number.NEGATIVE_INFINITY;
  #calmRateBps = 0;
  readonly #gate = new RelayGate();
  #isEnded = false;
  /** The VM stands still, and whatever is on its way is waited for: nothing of it is held back. */
  #isHurried = false;
  /** The destination was told that nothing is pending any more. */
  #isDivided = false;
  #wake = Promise.withResolvers<void>();

  /** By an agent whose work this one goes on with. */
  readonly #sentBefore: number;
  #devicePages: DevicePages = { areas: [], anchors: [] };

  constructor(options: SourceAgentOptions) {
    this.#options = options;
    this.#sentBefore = options.statistics.wireBytes;
    const { link, limitBps } = options;
    // The first round is as long as it is; from the second on, the end may be near.
    const isUrgent = () => !this.#isHurried && (this.#round > 1 || this.#state !== 'copying');
    // The disk changes meanwhile: a page that refers to it must not be long on its way.
    const reserveBytes = () => (isUrgent() || this.#refersToDisk ? 0 : mostReserveBytes);
    this.#outbox = new Outbox({
      link,
      signal: this.#abort.signal,
      limitBps,
      isUrgent,
      reserveBytes,
      onSent: (pieces) => this.#condenser?.takeBack(pieces),
    });
    options.devicePages?.then((known) => {
      this.#devicePages = known;
    });
    if (options.drainAtOnce && this.#canDrain) this.#state = 'draining';
  }

  get statistics(): EngineStatistics {
    const { statistics } = this.#options;
    const relayedBytes = this.#options.divider?.sentBytes ?? 0;
    statistics.wireBytes = this.#sentBefore + this.#outbox.sentBytes + relayedBytes;
    return statistics;
  }

  /** From now on pages are pending. Without access to the VM's memory it goes on as before. */
  drain(): void {
    if (this.#state !== 'copying' || !this.#canDrain) return;
    this.#isDrainWanted = true;
    this.#outbox.kick();
  }

  /** Whether the VM stands still for what is on its way and what is left. */
  hurry(isStopped: boolean): void {
    this.#isHurried = isStopped;
    if (isStopped) this.#isLeaving = true;
  }

  get #canDrain(): boolean {
    return this.#options.memory !== undefined && this.#options.mode !== 'precopy';
  }

  /**
   * It has drained long enough to know which pages the guest writes all the time, and relays that are to have all of it
   * first have it.
   */
  get isSampled(): boolean {
    if (!this.#canDrain) return true;
    const { divider, dividesFirst } = this.#options;
    const isDividing = divider?.isUsable && (this.#fresh.size > 0 || !divider.isSettled);
    if (dividesFirst && isDividing) return false;
    if (this.#sampledSince === undefined) return false;
    const sampledMs = performance.now() - this.#sampledSince;
    return (
      sampledMs > mostSampleMs || (sampledMs > sampleMs && (this.#isScatteredSent || divider !== undefined))
    );
  }

  /** The destination has not taken the first round yet. */
  get isBehind(): boolean {
    return !this.#isFirstRoundTaken && this.#state === 'copying';
  }

  /** QEMU has begun another round. */
  noteRound(round: number): void {
    if (round <= this.#round) return;
    this.#heat.noteRounds(round - this.#round);
    this.#round = round;
    this.#firstRound ??= this.#untilTaken().then(() => {
      this.#isFirstRoundTaken = true;
    });
    // Waited for where the stream is read.
    this.#firstRound.catch(() => {});
    if (this.#state === 'draining' && this.#sampledSince === undefined) {
      this.#heat.begin();
      this.#sampledSince = performance.now();
      if (!this.#options.divider) this.#scattering = this.#sendScattered();
      // Waited for before the tail.
      this.#scattering.catch(() => {});
    }
    const { guestBytes: allBytes, pages } = this.statistics;
    // What a round finds as it was sent already was written before it was read: the last round has no time for that.
    const guestBytes = allBytes - pages.unchanged * pageBytes;
    const wireBytes = this.#outbox.madeBytes;
    const guest = guestBytes - this.#atRound.guestBytes;
    // The first one is all of the memory, of which the other end has most: it says nothing about what changes.
    if (guest > 0 && round > 2) this.#ratio = Math.min(1, (wireBytes - this.#atRound.wireBytes) / guest);
    this.#atRound = { guestBytes, wireBytes };
  }

  /** Bytes of the guest's changes that the link takes in a second; `undefined` while nobody knows. */
  get changesPerSecond(): number | undefined {
    const { speed } = this.#outbox;
    return speed === undefined ? undefined : speed / Math.max(0.01, this.#ratio);
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
      const dividing = this.#divideEarly();
      dividing.catch(() => {});
      await Promise.race([
        Promise.all([this.#copy(this.#options.qemu), dividing]),
        listening.then(() => this.#endedEarly()),
      ]);
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
    for (const name of memory && !this.#options.dividesAll ? sets : []) {
      const index = await openIndex(name);
      if (!index) continue;
      chosen.push(name);
      this.#sets.push(index);
    }
    this.#refersToDisk = chosen.includes(mirroredSet);
    this.#destinationReads = reads && memory !== undefined;
    const spoken = memory ? mode : 'precopy';
    this.#outbox.send(
      encodeJson(frame.hello, { version: protocolVersion, mode: spoken, sets: chosen, keeps }),
    );
  }
  #destinationReads = false;
  #refersToDisk = false;

  async #copy(qemu: Readable): Promise<void> {
    let isRoundOver = false;
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
        isRoundOver = true;
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
    for await (const bytes of bytesFrom(qemu)) {
      if (this.#isDrainWanted && this.#state === 'copying' && !isPlain) await this.#beginToDrain();
      else if (this.isBehind && !isPlain) await this.#firstRound;
      if (bytes.length >= busyBytes) this.#busyAt = performance.now();
      if (isPlain) this.#outbox.send(encodeFrame(frame.rest, bytes));
      else isPlain = this.#parse(parser, bytes);
      if (!this.#batch.isEmpty && this.#outbox.isIdle) this.#flush();
      // What is only noted needs no room.
      while (this.#state === 'copying' && !this.#outbox.hasRoom) await this.#outbox.change();
      if (isRoundOver && this.#sampledSince !== undefined && !this.isSampled)
        await Promise.race([delay(sampleRoundMs, this.#abort.signal), this.#outbox.failed]);
      isRoundOver = false;
    }
    if (isPlain) return;
    parser.end();
    await this.#sendTail();
  }

  async #beginToDrain(): Promise<void> {
    await this.#untilTaken();
    this.#state = 'draining';
  }

  /** Until the destination's QEMU has got all that came so far. */
  async #untilTaken(): Promise<void> {
    this.#flush();
    this.#lastMark += 1;
    const { promise, resolve } = Promise.withResolvers<void>();
    this.#marks.set(this.#lastMark, resolve);
    this.#outbox.send(encodeFrame(frame.mark, encodeWord(this.#lastMark)));
    await Promise.race([promise, this.#outbox.failed]);
  }

  /** True when the stream goes on as it is, since it holds what we do not know. */
  #parse(parser: StreamParser, bytes: Uint8Array): boolean {
    this.#preamble?.push(Buffer.from(bytes));
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
    this.#fresh = new PageSet(table.pages);
    this.#early = new PageSet(table.pages);
    this.#stale = new PageSet(table.pages);
    this.#heat = new PageHeat(table.pages);
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
    if (this.#options.mode === 'postcopy') this.#beginDivision();
  }

  /** It will be read later. */
  #putOff(page: number): void {
    this.#pending.add(page);
    if (this.#early.has(page)) this.#stale.add(page);
    else this.#fresh.add(page);
  }

  #see(page: number): void {
    if (!this.#unseen.delete(page)) this.#heat.note(page);
  }

  #page(page: number, buffer: Buffer, at: number): void {
    this.#see(page);
    if (this.#state !== 'copying') {
      this.#putOff(page);
      return;
    }
    this.#batch.addPage(page, buffer, at);
    if (this.#batch.isFull) this.#flush();
  }

  #zeroPage(page: number): void {
    this.#see(page);
    if (this.#state !== 'copying') {
      this.#putOff(page);
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

  #dispatch(batch: PageBatch, plain: boolean): Promise<Uint8Array[]> {
    const onTaken = () => {
      batch.clear();
      this.#spare.push(batch);
    };
    const condensed = this.#condenser!.condense(batch, { plain, onTaken });
    this.#outbox.send(condensed);
    this.#outbox.onRoom(() => {
      if (this.#outbox.isIdle && this.#state === 'copying') this.#flush();
    });
    return condensed;
  }

  /** The state of the devices and what is still to come, in one flight. */
  async #sendTail(): Promise<void> {
    this.#isLeaving = true;
    await this.#scattering;
    this.#flush();
    const isPostcopy = this.#state === 'draining';
    const { onStep } = this.#options;
    onStep?.('stream ended', { pendingPages: this.#pending.size });
    const tail = Buffer.concat(this.#tail.splice(0));
    let given: readonly number[] = [];
    if (isPostcopy) {
      for (const [first, count] of this.#unseen.runs()) this.#pending.addRange(first, count);
      given = this.#sendDevicePages(tail);
      if (!this.#dividesAll) await this.#sendHot();
      this.#condenser!.enterPostcopy();
    }
    this.#state = 'serving';
    this.#calmRateBps = statsOf(this.#options.link)?.deliveryRateBps ?? 0;
    const missing = PageSet.fromBytes(this.#table!.pages, this.#pending.toBytes());
    missing.addAll(this.#early);
    for (const page of given) missing.delete(page);
    if (this.#hasDivision) this.#options.divider!.addStale(this.#stale.runs());
    this.#options.statistics.postcopyPages = missing.size;
    const pending = isPostcopy ? missing.toBytes() : Buffer.alloc(0);
    const sizes = Buffer.alloc(8);
    sizes.writeUInt32BE(tail.length);
    sizes.writeUInt32BE(pending.length, 4);
    const packed = await compress(Buffer.concat([tail, pending]));
    // From then on the guest runs, and what it asks for must not stand behind much.
    void this.#outbox.send(encodeFrame(frame.tail, sizes, packed)).then(() => {
      this.#isHurried = false;
    });
    onStep?.('tail', { tailBytes: tail.length, packedBytes: packed.length, hotPages: this.#warm.length });
  }

  #beginDivision(): void {
    const { divider } = this.#options;
    if (!divider) return;
    this.#hasDivision = true;
    divider.begin({
      tell: (bytes) => this.#tell(bytes),
      giveBack: (runs) => {
        for (const [first, count] of runs) this.#pending.addRange(first, count);
        this.#isDivided = false;
      },
      wake: () => this.#wake.resolve(),
    });
  }

  /** Where slabs are is told in a few bytes each, which go together: each by itself would wait for its share of the uplink. */
  #tell(bytes: Buffer): void {
    this.#words.push(bytes);
    if (this.#words.length === 1) this.#outbox.send(() => this.#words.splice(0));
  }

  /** What the destination lacks of the pages that its QEMU reads before the VM runs. Gives their numbers. */
  #sendDevicePages(tail: Buffer): number[] {
    const isLacking = (page: number) => this.#pending.has(page) || this.#early.has(page);
    const lacking = numbersOf(this.#devicePages, this.#table!, tail).filter(isLacking);
    for (let at = 0; at < lacking.length; at += hotPages) {
      const batch = this.#spare.pop() ?? new PageBatch();
      for (const page of lacking.slice(at, at + hotPages)) {
        if (this.#dividesAll) this.#read(batch, page, 1);
        else this.#takePending(batch, page, 1);
        if (!this.#dividesAll) this.#early.delete(page);
      }
      this.#send(batch, false);
    }
    return lacking;
  }

  /**
   * The VM stands still, and would ask first of all for the pages that it writes all the time: a round trip for each.
   * So they go before it runs, the hottest first, as many as the link takes in a moment.
   */
  async #sendHot(): Promise<void> {
    const hot = this.#heat.hot(this.#pending);
    this.#warm = hot;
    const startedAt = performance.now();
    let leftBytes = ((this.#outbox.speed ?? leastBytesPerSecond) * hotMs) / 1000;
    const making = new Set<Promise<void>>();
    for (let at = 0; at < hot.length && leftBytes > 0; at += hotPages) {
      if (performance.now() - startedAt > hotMs) break;
      const batch = this.#spare.pop() ?? new PageBatch();
      for (const page of hot.slice(at, at + hotPages)) {
        this.#takePending(batch, page, 1);
        this.#early.delete(page);
      }
      const made = this.#dispatch(batch, false).then((pieces) => {
        leftBytes -= pieces.reduce((sum, { length }) => sum + length, 0);
        making.delete(made);
      });
      making.add(made);
      if (making.size >= hotBatches) await Promise.race(making);
    }
    await Promise.all(making);
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
    let next = await frames.next();
    // A guest that waits for pages asks as soon as its QEMU has a stream, which may be before the list is packed.
    for (; next.value?.type === frame.want; next = await frames.next()) this.#heed(next.value);
    if (next.done || next.value.type !== frame.missing) throw agentError('not what is missing');
    const { pages } = this.#table!;
    const bits = await decompress(next.value.body, { maxOutputLength: pages / 8 + 64 });
    this.#pending = PageSet.fromBytes(pages, bits);
    this.#beginDivision();
  }

  async #listen(frames: AsyncIterable<Heard>): Promise<void> {
    for await (const heard of frames) this.#heed(heard);
    this.#isEnded = true;
    this.#wake.resolve();
  }

  #heed({ type, body }: Heard): void {
    if (type === frame.lost) {
      this.#condenser?.drop(body);
      return;
    }
    if (type === frame.marked && body.length === 4) {
      const number = body.readUInt32BE(0);
      this.#marks.get(number)?.();
      this.#marks.delete(number);
      return;
    }
    if (type !== frame.want || !this.#table) throw agentError(`a frame of type ${type}`);
    const plain = body[0] === 1;
    if (!plain) this.#wantedAt = performance.now();
    for (let at = 1; at + 4 <= body.length; at += 4) {
      const page = body.readUInt32BE(at);
      if (page >= this.#table.pages || this.#wants.length >= mostWants)
        throw agentError(`a request for page ${page}`);
      this.#wants.push({ page, plain });
    }
    this.#wake.resolve();
    if (this.#state !== 'serving' && this.#wants.length > 0) this.#takeWants();
  }

  async #serve(): Promise<void> {
    const { divider } = this.#options;
    if (divider) return this.#serveDivided(divider);
    while (!this.#isEnded) {
      if (this.#wants.length > 0) {
        this.#takeWants();
      } else if (this.#pending.size > 0) {
        this.#push();
      } else {
        await this.#wake.promise;
        this.#wake = Promise.withResolvers();
      }
      await this.#untilMoreMayGo();
    }
  }

  /** While the VM runs: what QEMU has written once, as fast as relays take it. */
  async #divideEarly(): Promise<void> {
    const { divider } = this.#options;
    while (divider && !this.#isEnded && !this.#isLeaving) {
      const isCalm = performance.now() - this.#busyAt > busyMs;
      const mayDivide = isCalm && this.#hasDivision && this.#state === 'draining' && this.#fresh.size > 0;
      if (mayDivide && divider.hasRoom && divider.queuedMs < earlyQueueMs) this.#divide(divider, this.#fresh);
      else {
        await Promise.race([delay(earlyPollMs, this.#abort.signal), this.#wake.promise]);
        this.#wake = Promise.withResolvers();
      }
      await nextTurn();
    }
  }

  /**
   * While the VM runs and the link has nothing else: pages that have changed here and there, and not in the rounds of
   * sampling. The guest may only read them now, so their heat says nothing; it would ask for one after the other. Those
   * that it writes again meanwhile are pending again.
   */
  async #sendScattered(): Promise<void> {
    const { link } = this.#options;
    let scattered: number[] = [];
    while (!this.#isEnded && !this.#isLeaving) {
      if (scattered.length === 0) {
        scattered = this.#heat.scattered(this.#pending);
        this.#isScatteredSent = scattered.length === 0;
      }
      const mayPush = this.#outbox.isIdle && isClear(link, statsOf(link)?.deliveryRateBps ?? 0);
      if (scattered.length > 0 && mayPush) {
        const batch = this.#spare.pop() ?? new PageBatch();
        for (const page of scattered.splice(0, this.#pagesAtOnce))
          if (this.#pending.has(page)) this.#takePending(batch, page, 1);
        this.#send(batch, false);
      }
      await Promise.race([delay(shallowPollMs, this.#abort.signal), this.#outbox.failed]);
    }
  }

  /** The destination takes what it can, and relays the rest. */
  async #serveDivided(divider: Divider): Promise<void> {
    while (!this.#isEnded) {
      const woken = this.#wake.promise;
      const isPending = this.#pending.size > 0;
      if (this.#wants.length > 0) this.#takeWants();
      else if (isPending && this.#isPushWanted(divider)) this.#push();
      else if (isPending && divider.hasRoom && (this.#dividesAll || this.#isGateOpen(divider)))
        this.#divide(divider, this.#pending);
      else {
        if (!isPending && divider.isSettled && !this.#isDivided) {
          this.#isDivided = true;
          this.#outbox.send(encodeFrame(frame.divided, encodeWord(divider.size)));
        }
        const isLinkAwaited = isPending && this.#wants.length === 0;
        const pause = isLinkAwaited ? delay(shallowPollMs, this.#abort.signal) : woken;
        await Promise.race([pause, woken, this.#outbox.failed]);
        this.#wake = Promise.withResolvers();
      }
      // What came in meanwhile is heard.
      await nextTurn();
      await this.#outbox.room(mostWords);
    }
  }

  #isPushWanted(divider: Divider): boolean {
    return !this.#dividesAll && this.#isLinkOpen && this.#isGuestCalm && !this.#isEndNear(divider);
  }

  /** With too few relays it is a post-copy like any other. */
  get #dividesAll(): boolean {
    const { dividesAll, divider } = this.#options;
    return dividesAll === true && divider?.isUsable === true;
  }

  /** Relays take the rest in a moment: the last word would stand behind whatever goes to a slow destination now. */
  #isEndNear(divider: Divider): boolean {
    const restBytes = this.#pending.size * pageBytes;
    return restBytes < (divider.bytesPerSecond * endMs) / 1000 && this.#isGateOpen(divider);
  }

  /** One that says nothing of what has arrived may be slow. */
  #isGateOpen(divider: Divider): boolean {
    const { link } = this.#options;
    const stats = statsOf(link);
    if (!stats) return true;
    const { sentBytes, unacknowledgedBytes } = stats;
    const directBytes = sentBytes - unacknowledgedBytes;
    return this.#gate.isOpen({ now: performance.now(), directBytes, relayedBytes: divider.placedBytes });
  }

  /** Up to a slab of these pages, which are pending, for relays; zeroes among it need none. */
  #divide(divider: Divider, pages: PageSet): void {
    const batch = this.#spare.pop() ?? new PageBatch();
    const zeroes: Run[] = [];
    for (let scanned = 0; scanned < scannedPages && batch.dataPages < slabPages; ) {
      const first = pages.next(this.#nextPush);
      if (first < 0 && this.#nextPush === 0) break;
      this.#nextPush = Math.max(first, 0);
      if (first < 0) continue;
      const [[, count]] = pages.runs(first, first + slabPages - batch.dataPages) as [[number, number]];
      this.#takePending(batch, first, count);
      if (pages === this.#fresh) this.#early.addRange(first, count);
      this.#nextPush = first + count;
      scanned += count;
      zeroes.push(...batch.takeZeroes());
    }
    if (zeroes.length > 0) divider.addZeroes(zeroes);
    const onTaken = () => {
      batch.clear();
      this.#spare.push(batch);
    };
    if (batch.isEmpty) {
      onTaken();
      return;
    }
    const isEarly = pages === this.#fresh;
    divider.add((slab) => this.#fillSlab(divider, { slab, batch, onTaken, isEarly }), batch.dataRuns);
  }

  /** What both ends hold needs no relay: it is told to the destination in a few bytes. */
  async #fillSlab(
    divider: Divider,
    wanted: { slab: number; batch: PageBatch; onTaken: () => void; isEarly: boolean },
  ): Promise<SlabContent | undefined> {
    const { slab, batch, onTaken, isEarly } = wanted;
    const condenser = this.#condenser!;
    if (condenser.hasSets) {
      const isKnown = await condenser.inSets(batch);
      const known = this.#spare.pop() ?? new PageBatch();
      if (isKnown.includes(true)) batch.move(isKnown, known);
      // While the VM runs they may change before they are there.
      if (isEarly) this.#takeBack(known);
      else this.#send(known, false);
    }
    if (batch.isEmpty) {
      onTaken();
      return undefined;
    }
    const alike = this.#takeAlike(divider, slab, batch);
    const runs = batch.dataRuns;
    const parts: PageBatch[] = [];
    for (let first = 0; first < batch.dataPages; first += partPages) parts.push(batch.part(first, partPages));
    onTaken();
    const condensed = await Promise.all(
      parts.map((part) => condenser.condense(part, { plain: true, onTaken: () => {} })),
    );
    // Without the frame's head: the slab has its own.
    return { parts: condensed.map(([, ...body]) => body), runs, alike };
  }

  /** What is in a slab already leaves the batch. */
  #takeAlike(divider: Divider, slab: number, batch: PageBatch): AlikePage[] {
    const startedAt = performance.now();
    const digests = digestBlocks(batch.content.subarray(0, batch.dataPages * pageBytes));
    const alike: AlikePage[] = [];
    const isAlike = batch.entries.map(({ page }, index) => {
      const found = divider.like(
        digests.subarray(index * digestBytes, (index + 1) * digestBytes),
        slab,
        page,
      );
      if (found) alike.push({ page, slab: found.slab, like: found.page });
      return found !== undefined;
    });
    this.#options.statistics.cpuMs.digest += performance.now() - startedAt;
    if (alike.length > 0) {
      const others = this.#spare.pop() ?? new PageBatch();
      batch.move(isAlike, others);
      others.clear();
      this.#spare.push(others);
    }
    return alike;
  }

  #takeBack(batch: PageBatch): void {
    for (const [first, count] of batch.dataRuns) {
      this.#pending.addRange(first, count);
      for (let page = first; page < first + count; page++) this.#early.delete(page);
    }
    batch.clear();
    this.#spare.push(batch);
  }

  /** Fewer on a slow link. */
  get #pagesAtOnce(): number {
    const { link } = this.#options;
    const stats = statsOf(link);
    if (!stats) return pushPages;
    const [rateBps, ms] = this.#isRestless
      ? [this.#calmRateBps, restlessPushMs]
      : [stats.deliveryRateBps, pushMs];
    const pages = Math.floor(((rateBps / 8000) * ms) / pageBytes);
    return Math.min(pushPages, Math.max(leastPushPages, pages));
  }

  get #isGuestCalm(): boolean {
    const { divider } = this.#options;
    return !this.#isRestless || !divider?.hasRoom || !this.#isGateOpen(divider);
  }

  get #isLinkOpen(): boolean {
    return this.#outbox.isIdle && isShallow(this.#options.link);
  }

  /**
   * What the link holds is what a page that the guest waits for stands behind: no more than keeps it busy, and next to
   * nothing while the guest asks for one page after the other.
   */
  async #untilMoreMayGo(): Promise<void> {
    const { link } = this.#options;
    await this.#outbox.room(1);
    if (!this.#isRestless) this.#calmRateBps = statsOf(link)?.deliveryRateBps ?? 0;
    const mayPush = () =>
      this.#isRestless ? this.#outbox.isIdle && isClear(link, this.#calmRateBps) : isShallow(link);
    while (this.#wants.length === 0 && !this.#isEnded && !mayPush())
      await Promise.race([delay(shallowPollMs, this.#abort.signal), this.#outbox.failed]);
  }

  /** The guest has asked for something lately, and is about to ask for more. */
  get #isRestless(): boolean {
    return performance.now() - this.#wantedAt <= calmMs;
  }

  /** What was asked for goes by itself, so that it waits for nothing; what lies behind it follows, and is pushed on from there. */
  #takeWants(): void {
    const batch = this.#spare.pop() ?? new PageBatch();
    const behind = this.#spare.pop() ?? new PageBatch();
    const plain = this.#wants[0]!.plain;
    const { statistics } = this.#options;
    while (this.#wants[0]?.plain === plain && !batch.isFull && !behind.isFull && this.#wants.length > 0) {
      const { page } = this.#wants.shift()!;
      if (plain) {
        statistics.repairedPages += 1;
        this.#read(batch, page, 1);
        // While the VM runs it may change again, and then it is pending all the same.
        if (this.#state === 'serving') this.#pending.delete(page);
        continue;
      }
      statistics.requestedPages += 1;
      // If it is not pending it is on its way, or relays have it or are about to.
      if (this.#dividesAll) {
        this.#read(batch, page, 1);
        continue;
      }
      this.#takePending(batch, page, 1);
      // Memory that a guest got page by page often lies in it from the end to the beginning.
      const isBackwards = page < this.#lastWant && page >= this.#lastWant - prefetchPages;
      this.#lastWant = page;
      const from = isBackwards ? Math.max(0, page - prefetchPages) : page + 1;
      const end = isBackwards ? page : page + prefetchPages;
      for (const [first, count] of this.#pending.runs(from, end)) {
        this.#takePending(behind, first, count);
        if (behind.isFull) break;
      }
      if (!this.#hasDivision && !isBackwards) this.#nextPush = end;
    }
    this.#send(batch, plain);
    this.#send(behind, plain);
  }

  #push(): void {
    const batch = this.#spare.pop() ?? new PageBatch();
    const most = this.#pagesAtOnce;
    // In turns with what lies behind the last page that was asked for.
    this.#isWarmDue = !this.#isRestless || !this.#isWarmDue;
    while (this.#isWarmDue && this.#warmAt < this.#warm.length && batch.dataPages < most && !batch.isFull) {
      const page = this.#warm[this.#warmAt++]!;
      if (this.#pending.has(page)) this.#takePending(batch, page, 1);
    }
    if (batch.isEmpty) this.#takeInOrder(batch, most);
    this.#send(batch, false);
  }

  #takeInOrder(batch: PageBatch, most: number): void {
    for (let taken = 0; taken < most && this.#pending.size > 0; ) {
      const first = this.#pending.next(this.#nextPush);
      if (first < 0) {
        this.#nextPush = 0;
        continue;
      }
      const [[, count]] = this.#pending.runs(first, first + most - taken) as [[number, number]];
      this.#takePending(batch, first, count);
      this.#nextPush = first + count;
      taken += count;
    }
  }

  #takePending(batch: PageBatch, first: number, count: number): void {
    this.#read(batch, first, count);
    for (let page = first; page < first + count; page++) {
      this.#pending.delete(page);
      this.#fresh.delete(page);
    }
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
