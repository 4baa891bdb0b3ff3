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
 * Because the source QEMU knows nothing of post-copy, it can let the VM run again as long as nobody else did.
 *
 * Here is what the two agents say to each other, and when. The rest is in parts, for which `course.ts` says how far it is:
 * `precopy-intake.ts` takes QEMU's stream in, `pending-pages.ts` knows what is still to go, `page-requests.ts` and
 * `page-pusher.ts` choose of it at the pace of `push-pace.ts`, `batch-sender.ts` brings it to the link, and
 * `relayed/memory-division.ts` to relays.
 */
import type { Duplex, Readable } from 'node:stream';
import { promisify } from 'node:util';
import { zstdCompress, zstdDecompress } from 'node:zlib';
import type { EngineStatistics } from '../../model/migration.ts';
import { MiB } from '../../model/units.ts';
import type { SetIndex, SetName } from '../../pages/index.ts';
import type { BlockTable } from '../../stream/index.ts';
import type { Divider } from '../relayed/divider.ts';
import { MemoryDivision } from '../relayed/memory-division.ts';
import { BatchSender } from './batch-sender.ts';
import type { CompressionMode } from './compression.ts';
import { Course } from './course.ts';
import { type DevicePages, numbersOf } from './device-pages.ts';
import { mirroredSet } from './disk-frames.ts';
import { firstOf, framesOf } from './frame-stream.ts';
import { agentError, encodeFrame, encodeJson, frame, protocolVersion } from './frames.ts';
import type { GuestRam } from './guest-memory.ts';
import { type AgentMode, parseOffer } from './handshake.ts';
import { PagePusher } from './page-pusher.ts';
import { PageRequests } from './page-requests.ts';
import { PendingPages } from './pending-pages.ts';
import { PrecopyIntake } from './precopy-intake.ts';
import { PushPace } from './push-pace.ts';
import { QemuRounds } from './qemu-rounds.ts';

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

/**
 * In the first round most pages are known, and cost time but hardly bytes: what others need is made ahead, so that the link
 * has something to carry meanwhile. On 60 Mbit/s this is enough for 3 s.
 */
const mostReserveBytes = 24 * MiB;
/** QEMU numbers sections from 0; this is none of them, and what the number of RAM was nobody needs to remember. */
const resumedSectionId = 0x7fff_ffff;

interface Heard {
  type: number;
  body: Buffer;
}

export class SourceAgent {
  readonly #options: SourceAgentOptions;
  readonly #abort = new AbortController();
  readonly #course = new Course();
  readonly #rounds = new QemuRounds();
  readonly #sender: BatchSender;
  readonly #pages: PendingPages;
  readonly #pace: PushPace;
  readonly #pusher: PagePusher;
  readonly #requests: PageRequests;
  readonly #division: MemoryDivision | undefined;
  readonly #sets: SetIndex[] = [];
  readonly #intake: PrecopyIntake;
  #table: BlockTable | undefined;
  #destinationReads = false;
  #refersToDisk = false;
  /** The VM stands still, and whatever is on its way is waited for: nothing of it is held back. */
  #isHurried = false;
  /** By an agent whose work this one goes on with. */
  readonly #sentBefore: number;
  #devicePages: DevicePages = { areas: [], anchors: [] };

  constructor(options: SourceAgentOptions) {
    this.#options = options;
    this.#sentBefore = options.statistics.wireBytes;
    const { link, limitBps, memory, statistics, divider, dividesAll = false } = options;
    const { signal } = this.#abort;
    const course = this.#course;
    // The first round is as long as it is; from the second on, the end may be near.
    const isUrgent = () => !this.#isHurried && (this.#rounds.number > 1 || course.state !== 'copying');
    // The disk changes meanwhile: a page that refers to it must not be long on its way.
    const reserveBytes = () => (isUrgent() || this.#refersToDisk ? 0 : mostReserveBytes);
    const sender = new BatchSender({ link, signal, limitBps, isUrgent, reserveBytes });
    const pages = new PendingPages({ memory, statistics });
    const pace = new PushPace({ link, outbox: sender.outbox });
    const parts = { course, pages, sender, pace, statistics };
    const { dividesFirst = false } = options;
    const ofRelays = { divider, dividesFirst, dividesAll, rounds: this.#rounds, link, signal };
    this.#division = divider && new MemoryDivision({ ...parts, ...ofRelays, divider });
    this.#requests = new PageRequests({ ...parts, relays: this.#division });
    this.#pusher = new PagePusher({ ...parts, rounds: this.#rounds });
    this.#sender = sender;
    this.#pages = pages;
    this.#pace = pace;
    const canDrain = memory !== undefined && options.mode !== 'precopy';
    this.#intake = new PrecopyIntake({
      ...parts,
      rounds: this.#rounds,
      pusher: this.#pusher,
      division: this.#division,
      dividesFirst,
      canDrain,
      onBlocks: (table) => this.#begin(table),
      onLayout: (opening, sectionId) => this.#sendOpening(opening, sectionId),
      signal,
    });
    options.devicePages?.then((known) => {
      this.#devicePages = known;
    });
    if (options.drainAtOnce && canDrain) course.state = 'draining';
  }

  get statistics(): EngineStatistics {
    const { statistics } = this.#options;
    const relayedBytes = this.#division?.sentBytes ?? 0;
    statistics.wireBytes = this.#sentBefore + this.#sender.outbox.sentBytes + relayedBytes;
    return statistics;
  }

  /** From now on pages are pending. Without access to the VM's memory it goes on as before. */
  drain(): void {
    this.#intake.drain();
  }

  /** QEMU has begun another round. */
  noteRound(round: number): void {
    this.#intake.noteRound(round);
  }

  /** Long enough to know what the VM writes all the time; see `MemoryAgent`, which it and the next two are for. */
  get isSampled(): boolean {
    return this.#intake.isSampled;
  }

  get isBehind(): boolean {
    return this.#intake.isBehind;
  }

  get changesPerSecond(): number | undefined {
    return this.#intake.changesPerSecond;
  }

  /** Whether the VM stands still for what is on its way and what is left. */
  hurry(isStopped: boolean): void {
    this.#isHurried = isStopped;
    if (isStopped) this.#course.isLeaving = true;
  }

  /** Resolves when the destination needs nothing any more. Whatever breaks it, it destroys the link. */
  async run(): Promise<void> {
    const { link } = this.#options;
    try {
      await Promise.race([this.#run(), this.#sender.outbox.failed]);
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
    await this.#hello(parseOffer(await firstOf(frames, frame.offer, 'offer')));
    if (this.#options.qemu) {
      const listening = this.#listen(frames);
      const dividing = this.#division?.divideEarly();
      dividing?.catch(() => {});
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
    this.#sender.outbox.send(
      encodeJson(frame.hello, { version: protocolVersion, mode: spoken, sets: chosen, keeps }),
    );
  }

  #begin(table: BlockTable): void {
    const { memory, compression, statistics } = this.#options;
    memory?.use(table);
    this.#table = table;
    this.#pages.begin(table);
    this.#rounds.begin(table.pages);
    this.#sender.begin({
      pages: table.pages,
      sets: this.#sets,
      destinationReads: this.#destinationReads,
      ...(compression && { compression }),
      statistics,
    });
  }

  #sendOpening(opening: Buffer, sectionId: number): void {
    if (opening.length > 0) this.#sender.outbox.send(encodeFrame(frame.opening, opening));
    this.#sendLayout(sectionId);
    if (this.#options.mode === 'postcopy') this.#division?.begin();
  }

  #sendLayout(sectionId: number): void {
    const blocks = this.#table!.blocks.map(({ name, sizeBytes }) => ({ name, sizeBytes }));
    this.#sender.outbox.send(encodeJson(frame.blocks, { sectionId, blocks }));
  }

  async #copy(qemu: Readable): Promise<void> {
    const tail = await this.#intake.take(qemu);
    if (tail) await this.#sendTail(tail);
  }

  /** The state of the devices and what is still to come, in one flight. */
  async #sendTail(tail: Buffer): Promise<void> {
    const { onStep, statistics } = this.#options;
    const course = this.#course;
    const isPostcopy = course.state === 'draining';
    onStep?.('stream ended', { pendingPages: this.#pages.pending.size });
    let given: readonly number[] = [];
    if (isPostcopy) {
      this.#pages.putOffUnseen();
      const isCopied = this.#division?.takesAll === true;
      const needed = numbersOf(this.#devicePages, this.#table!, tail);
      given = this.#pusher.sendNeeded(needed, { isCopied });
      if (!isCopied) await this.#pusher.sendHot();
      this.#sender.condenser.enterPostcopy();
    }
    course.state = 'serving';
    this.#pace.noteRate();
    const missing = this.#pages.missing();
    for (const page of given) missing.delete(page);
    this.#division?.tellStale();
    statistics.postcopyPages = missing.size;
    const pending = isPostcopy ? missing.toBytes() : Buffer.alloc(0);
    const sizes = Buffer.alloc(8);
    sizes.writeUInt32BE(tail.length);
    sizes.writeUInt32BE(pending.length, 4);
    const packed = await compress(Buffer.concat([tail, pending]));
    // From then on the guest runs, and what it asks for must not stand behind much.
    void this.#sender.outbox.send(encodeFrame(frame.tail, sizes, packed)).then(() => {
      this.#isHurried = false;
    });
    const { hotPages } = this.#pusher;
    onStep?.('tail', { tailBytes: tail.length, packedBytes: packed.length, hotPages });
  }

  /** Goes on where another agent, perhaps of an earlier daemon, was cut off. */
  async #resume(frames: ReturnType<typeof framesOf>): Promise<void> {
    const { memory } = this.#options;
    if (!memory) throw agentError('a wish to go on, but the memory cannot be read');
    this.#begin(memory.table());
    this.#course.state = 'serving';
    this.#sender.condenser.enterPostcopy();
    this.#sendLayout(resumedSectionId);
    let next = await frames.next();
    // A guest that waits for pages asks as soon as its QEMU has a stream, which may be before the list is packed.
    for (; next.value?.type === frame.want; next = await frames.next()) this.#heed(next.value);
    if (next.done || next.value.type !== frame.missing) throw agentError('not what is missing');
    const { pages } = this.#table!;
    this.#pages.restore(await decompress(next.value.body, { maxOutputLength: pages / 8 + 64 }));
    this.#division?.begin();
  }

  async #listen(frames: AsyncIterable<Heard>): Promise<void> {
    for await (const heard of frames) this.#heed(heard);
    this.#course.isEnded = true;
    this.#course.wake();
  }

  #heed({ type, body }: Heard): void {
    if (type === frame.lost) {
      this.#sender.drop(body);
      return;
    }
    if (type === frame.marked && body.length === 4) {
      this.#sender.noteMarked(body.readUInt32BE(0));
      return;
    }
    if (type !== frame.want || !this.#table) throw agentError(`a frame of type ${type}`);
    this.#requests.add(body);
    this.#course.wake();
    if (this.#course.state !== 'serving' && !this.#requests.isEmpty) this.#requests.answer();
  }

  async #serve(): Promise<void> {
    const course = this.#course;
    if (this.#division) return this.#division.serve(this.#requests, this.#pusher);
    while (!course.isEnded) {
      if (!this.#requests.isEmpty) {
        this.#requests.answer();
      } else if (this.#pages.pending.size > 0) {
        this.#pusher.push();
      } else {
        await course.woken;
        course.rearm();
      }
      await this.#pace.untilMoreMayGo(() => !this.#requests.isEmpty || course.isEnded);
    }
  }

  #endedEarly(): Promise<never> {
    throw agentError('its end before ours');
  }
}
