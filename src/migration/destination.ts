/**
 * The destination's side of one migration: the pure machine of `destination-machine.ts` with hands. It answers
 * `prepare` only after the caller's checks; it knows QEMU, and everything else only by the functions it is given.
 */
import { createHash, randomBytes, timingSafeEqual } from 'node:crypto';
import { rm } from 'node:fs/promises';
import { createConnection } from 'node:net';
import { dirname, join } from 'node:path';
import type { Duplex } from 'node:stream';
import { AppError, asAppError } from '../model/errors.ts';
import type { Uuid } from '../model/ids.ts';
import type { MergeStatistics, MigrationOptions, MigrationProgress, VmToMove } from '../model/migration.ts';
import { connectNbd, type NbdClient } from '../nbd/index.ts';
import type { BlockReader, SetName } from '../pages/index.ts';
import type { RelayHolds } from '../relay/index.ts';
import type { Machine } from '../vm/machine.ts';
import type { MachinePaths } from '../vm/paths.ts';
import { DestinationAgent, type Merging, type WholeStream } from './condensed/destination-agent.ts';
import { diskReader, takeDisk } from './condensed/disk-destination.ts';
import { mirroredSet } from './condensed/disk-frames.ts';
import { GuestMemory } from './condensed/guest-memory.ts';
import {
  type DestinationEffect,
  type DestinationEvent,
  type DestinationState,
  destinationOwns,
  destinationTransition,
  type Found,
  isDestinationOver,
} from './destination-machine.ts';
import { DiskArrival, type DiskArrivalOptions } from './disk-arrival.ts';
import { joinWithQemu } from './doors.ts';
import { Engine, type Journal } from './engine.ts';
import {
  closeDisk,
  listenForMemory,
  listenForRecovery,
  lookAt,
  serveDisk,
  stopListening,
  waitUntilComplete,
  waitUntilLoaded,
} from './memory-in.ts';
import { exportName } from './mirror.ts';
import type { Problem, SessionPurpose, Ticket, ToDestination, ToSource } from './protocol.ts';
import { Manifest } from './relayed/manifest.ts';
import { sumOfMerges } from './relayed/statistics.ts';

export interface DestinationSurroundings {
  journal: Journal<DestinationState>;
  /** Sends a message; it may be lost, and a failure means no more than that. */
  send: (message: ToSource) => Promise<void>;
  /** Checks and reserves; an empty list means that the VM is welcome. */
  check: () => Promise<Problem[]>;
  /**
   * Makes the VM's directory, its empty disk on the same image (unless shared) and a QEMU that waits for it. `listen`: what
   * lies under the disk is served by us, from before QEMU opens it.
   */
  make: (listen?: () => Promise<void>) => Promise<Machine>;
  /** Reference sets that this cloudlet holds, and their blocks. */
  sets?: () => Promise<SetName[]>;
  openReader?: (name: SetName) => Promise<BlockReader | undefined>;
  /** The source keeps the memory of the VM, whose pages have these digests; see `DestinationAgentOptions`. */
  remember?: (digests: Buffer) => void;
  /**
   * A file of the VM's, for as long as the migration takes: which pages were missing when the VM began to run. Without it
   * all pages go through QEMU's stream.
   */
  missing?: { read: () => Promise<Buffer | undefined>; write: (bits: Buffer) => Promise<void> };
  /** Relayed only. */
  merging?: {
    /** A session of a group of slabs with a relay. */
    openRelay: (id: Uuid, group: string, holds: RelayHolds) => Promise<Duplex>;
    /** A file of the VM's that nobody else reads: where all of it is that is missing, with the key. */
    readManifest: () => Promise<Buffer | undefined>;
    /** Resolves when it is on the disk. */
    writeManifest: (bytes: Buffer) => Promise<void>;
    removeManifest: () => Promise<void>;
    tellOperator: (message: string) => void;
    /** Where the disk comes by way of relays as well. */
    disk?: Omit<DiskArrivalOptions, 'sizeBytes' | 'openRelay' | 'tellOperator'> | undefined;
    /** Where there is a custodian. */
    escrow?: Escrow | undefined;
  };
  /** Removes what `make` made and reserved; QEMU has ended. Nothing there is no error. */
  discard: () => Promise<void>;
  onState?: (state: DestinationState) => void;
  /** What goes on within a state, for those who look where time goes. */
  onStep?: (step: string) => void;
  onFailure: (error: AppError) => void;
}

/** What a third cloudlet is left with, which may go on with the VM if this one is lost; and its word. */
export interface Escrow {
  /** Resolves when it is held there; tries until then. */
  deposit: (manifest: Manifest, whole: WholeStream, signal: AbortSignal) => Promise<void>;
  /**
   * The epoch by which it runs the VM itself; `undefined` if it does not, or does not answer. `isGone`: nobody runs it
   * here.
   */
  ask: (isGone: boolean) => Promise<number | undefined>;
  /** As `ask`, and from `undefined` on it never will. Tries until it is answered. */
  release: (signal: AbortSignal) => Promise<number | undefined>;
}

export interface DestinationMigrationOptions {
  vm: VmToMove;
  options: MigrationOptions;
  state: DestinationState;
  /** After a restart: the QEMU that was found, or `null`. */
  machine?: Machine | null;
  /** After a restart: the QEMU that is there and does not answer. Nothing is decided about its VM until it does. */
  silent?: SilentQemu | undefined;
  surroundings: DestinationSurroundings;
  retryMs?: number;
  /** How long the source may take to come with the ticket. */
  ticketMs?: number;
}

export interface SilentQemu {
  paths: MachinePaths;
  /** Past its main loop; see `SpareMonitor`. */
  recover: (socketPath: string) => Promise<void>;
}

/** One; and a source whose link was cut while its QEMU greeted ours comes again. */
const mostDiskSessions = 5;

/**
 * For QEMU to take a stream that was joined with it; it calls itself paused until it has. Each next one has twice as
 * long, so that on a busy machine one recovery does not end the other.
 */
const firstTakeTimeoutMs = 2000;
const mostTakeTimeoutMs = 8000;
/** For QEMU to say where its memory lies; without it an agent goes on with less. */
const pausedAnswerTimeoutMs = 500;

/**
 * QEMU answers nothing while one of its devices waits for a page, which may be for as long as the link is cut. Then
 * what is to be done about that must not wait behind the question.
 */
const pageTimeoutMs = 5000;

export class DestinationMigration {
  readonly #vm: VmToMove;
  readonly #options: MigrationOptions;
  readonly #around: DestinationSurroundings;
  readonly #engine: Engine<DestinationState, DestinationEvent, DestinationEffect>;
  readonly #ticketMs: number;
  readonly #retry: NodeJS.Timeout;
  readonly #abort = new AbortController();
  readonly #streams = new Set<Duplex>();
  #ticket: { ticket: Ticket; expiry: NodeJS.Timeout | undefined } | undefined;
  /** Post-copy waits for a source that comes back: QEMU listens, and the source is asked. */
  #isPaused = false;
  #acceptedAt = Number.NEGATIVE_INFINITY;
  #takeTimeoutMs = firstTakeTimeoutMs;
  #sessions = { disk: 0, memory: 0 };
  /** Our connection to the disk that QEMU serves; condensed only. */
  #disk: NbdClient | undefined;
  #diskClosed: Promise<void> | undefined;
  /** One that comes by way of relays. */
  readonly #arrival: DiskArrival | undefined;
  #machine: Machine | null;
  /** Relayed: where all of it is that is missing. From then on the source is not needed. */
  #manifest: Manifest | undefined;
  #agent: DestinationAgent | undefined;
  #isMergingAlone = false;
  #silent: SilentQemu | undefined;
  #isOffering = false;
  #isAsking = false;
  /** The source has heard that the VM runs here: it will never run it again. */
  readonly #heard = Promise.withResolvers<void>();
  #release: Promise<number | undefined> | undefined;
  readonly #decided = Promise.withResolvers<undefined>();
  /** The VM has ended while the daemon was away, and it is for a human to say where it goes on. */
  #isUndecided = false;
  #stopped = false;

  constructor(options: DestinationMigrationOptions) {
    const { vm, state, machine = null, silent, surroundings, retryMs = 1000, ticketMs = 60_000 } = options;
    this.#vm = vm;
    this.#options = options.options;
    this.#around = surroundings;
    this.#ticketMs = ticketMs;
    this.#machine = machine;
    this.#silent = silent;
    this.#arrival = this.#newArrival();
    this.#engine = new Engine({
      state,
      transition: destinationTransition,
      journal: surroundings.journal,
      perform: (effect) => this.#perform(effect),
      onState: (next) => {
        if (isDestinationOver(next)) this.#rest();
        surroundings.onState?.(next);
      },
      onFailure: surroundings.onFailure,
    });
    this.#retry = setInterval(() => {
      if (this.#engine.isIdle) this.#tell({ name: 'retry' });
      if (this.#silent) void this.#offerRecovery();
      void this.#askCustodian();
      if (this.#isPaused) this.#askForPages();
    }, retryMs);
    if (machine) this.#watchEnd(machine);
  }

  get state(): DestinationState {
    return this.#engine.state;
  }

  /** How far the merge is, once the source is not needed any more. */
  get mergeProgress(): MigrationProgress | undefined {
    const { mergeStatistics: merged } = this;
    const disk = this.#arrival?.merge;
    if (!(this.#manifest || disk) || !merged) return undefined;
    const sealedBytes = (this.#manifest?.sealedBytes ?? 0) + (disk?.totalBytes ?? 0);
    const totalBytes = Math.max(sealedBytes, merged.bytes);
    const fraction = Math.min(0.99, merged.bytes / Math.max(1, totalBytes));
    return {
      phase: 'merge',
      fraction,
      round: 0,
      doneBytes: merged.bytes,
      totalBytes,
      dirtyBps: 0,
      rateBps: 0,
    };
  }

  /** What was fetched from relays so far. */
  get mergeStatistics(): MergeStatistics | undefined {
    const memory = this.#agent?.mergeStatistics;
    const disk = this.#arrival?.merge?.statistics;
    return memory && disk ? sumOfMerges(memory, disk) : (memory ?? disk);
  }

  /** The QEMU of the VM; it is the caller's from `settled` on. */
  get machine(): Machine | null {
    return this.#machine;
  }

  /** Takes a message of the source. */
  async receive(message: ToDestination): Promise<void> {
    // It will be said again when QEMU answers.
    if (this.#silent) return;
    if (message.name !== 'prepare') return this.#engine.dispatch(message);
    if (this.state.name === 'absent') {
      const problems = await this.#around.check();
      // One that came again while this one was looked at finds what the first has made, and that refuses nothing.
      const isFirst = this.state.name === 'absent';
      if (isFirst && problems.length > 0) return this.#around.send({ name: 'refused', problems });
    }
    await this.#engine.dispatch({ name: 'prepare', epoch: message.vm.epoch });
  }

  /**
   * Takes a session of the source. `forbidden` for a wrong, used or expired ticket: one disk session and as many
   * for memory as were agreed on.
   */
  accept(purpose: SessionPurpose, secret: string, stream: Duplex): void {
    const { storage, channels, engine } = this.#options;
    const isDirect = (engine ?? 'direct') === 'direct';
    const arrival = this.#arrival;
    const memorySessions = isDirect ? 1 + channels : 1;
    const diskSessions = storage === 'copied' ? mostDiskSessions : 0;
    const most = purpose === 'disk' ? diskSessions : memorySessions;
    const isAwaited = this.state.name === 'waiting' || this.#isPaused;
    if (!this.#isTicket(secret) || !isAwaited || this.#sessions[purpose] >= most) {
      throw new AppError('forbidden', `The ticket is not good for a ${purpose} session`, {
        wanted: 'ticket',
      });
    }
    this.#around.onStep?.(`${purpose} session`);
    this.#sessions[purpose] += 1;
    this.#isPaused = false;
    this.#acceptedAt = performance.now();
    clearTimeout(this.#ticket!.expiry);
    this.#streams.add(stream);
    // Whoever uses it hears of it; and when nobody does any more, it may break as it will.
    stream.on('error', () => {});
    stream.once('close', () => this.#streams.delete(stream));
    const path = this.#socket(purpose);
    const rebuild = purpose === 'memory' ? this.#rebuild : this.#rebuildDisk;
    const joined =
      purpose === 'disk' && arrival
        ? arrival.take(stream)
        : isDirect
          ? joinWithQemu(path, stream)
          : rebuild.call(this, path, stream);
    joined.catch(() => {
      // QEMU notices by itself, and what becomes of it is watched.
    });
  }

  /** The destination's agent between link and QEMU. */
  async #rebuild(path: string, link: Duplex | undefined): Promise<void> {
    const machine = this.#machine;
    const { sets, openReader, missing } = this.#around;
    // One that lost its post-copy may wait for a page itself: who is to bring the page does not wait for its answer.
    const isFirst = this.state.name === 'waiting';
    const answer = isFirst ? { mayWrite: missing !== undefined } : { timeoutMs: pausedAnswerTimeoutMs };
    const qemu = createConnection({ path, allowHalfOpen: true });
    // Who merges has no link that could be broken when all of it is to end.
    this.#streams.add(qemu);
    qemu.once('close', () => this.#streams.delete(qemu));
    try {
      const memory = machine
        ? await GuestMemory.open(machine.process.pid, machine.qmp, answer).catch(() => undefined)
        : undefined;
      await using stack = new AsyncDisposableStack();
      if (memory) stack.use(memory);
      const agent = new DestinationAgent({
        link,
        qemu,
        memory,
        placing: isFirst && memory && missing ? { memory, keep: (bits) => missing.write(bits) } : undefined,
        missingBefore: isFirst ? undefined : await missing?.read(),
        sets: [...((await sets?.()) ?? []), ...(this.#disk ? [mirroredSet] : [])],
        openReader: async (name) =>
          name === mirroredSet && this.#disk ? diskReader(this.#disk) : openReader?.(name),
        remember: this.#around.remember,
        merging: this.#merging,
        ...(this.#around.onStep ? { onStep: this.#around.onStep } : {}),
      });
      this.#agent = agent;
      await agent.run();
    } catch (error) {
      qemu.destroy();
      link?.destroy();
      throw error;
    }
  }

  get #merging(): Merging | undefined {
    const { merging } = this.#around;
    if (this.#options.engine !== 'relayed' || !merging) return undefined;
    return {
      manifest: this.#manifest,
      openRelay: (id, group) => merging.openRelay(id, group, 'memory'),
      wantsWhole: merging.escrow !== undefined,
      keep: async (manifest, whole) => {
        if (merging.escrow && whole) {
          // Only then no way leads back to the source.
          await this.#heard.promise;
          if (!this.#isOurs) return;
          await merging.escrow.deposit(manifest, whole, this.#abort.signal);
        }
        await merging.writeManifest(manifest.toBytes());
        this.#manifest = manifest;
      },
      onDivided: () => this.#tell({ name: 'divided' }),
      onLost: merging.tellOperator,
    };
  }

  #newArrival(): DiskArrival | undefined {
    const { merging } = this.#around;
    if (!this.#options.relayed?.diskRelays || !merging?.disk) return undefined;
    return new DiskArrival({
      ...merging.disk,
      sizeBytes: this.#vm.spec.disk.sizeBytes,
      openRelay: (id, group) => merging.openRelay(id, group, 'disk'),
      tellOperator: merging.tellOperator,
    });
  }

  /** One that cannot be read is as good as none: the source is asked. */
  async #findManifest(): Promise<void> {
    const bytes = await this.#around.merging?.readManifest();
    if (!bytes) return;
    try {
      this.#manifest = Manifest.fromBytes(bytes);
    } catch (error) {
      this.#around.merging!.tellOperator(
        `The manifest of the VM's memory is lost: ${asAppError(error).message}`,
      );
    }
  }

  /**
   * The agent between link and the disk that QEMU serves. Its connection stays for memory, which refers to the disk,
   * until QEMU ends its server.
   */
  async #rebuildDisk(path: string, link: Duplex): Promise<void> {
    const { sets, openReader } = this.#around;
    try {
      const disk = await connectNbd({ path, exportName });
      this.#disk = disk;
      await takeDisk({
        disk,
        link,
        sets: (await sets?.()) ?? [],
        openReader: async (name) => openReader?.(name),
      });
    } catch (error) {
      link.destroy();
      throw error;
    }
  }

  /** The QEMU that was silent answers, or has ended (`null`). */
  async answers(machine: Machine | null): Promise<void> {
    this.#silent = undefined;
    this.#machine = machine;
    if (machine) this.#watchEnd(machine);
    await this.restart();
  }

  /** Goes on from the journal after the daemon was away. */
  async restart(): Promise<void> {
    await this.#findManifest();
    // First of all: its guest may wait for it.
    const isDiskKnown = (await this.#arrival?.reopen()) ?? true;
    const looked = await this.#look();
    const { complete } = looked;
    // Without its disk it is as one that has not come.
    const found = isDiskKnown || this.state.name !== 'waiting' ? looked.found : 'waiting';
    if (found === 'gone' && this.#isOurs && this.#manifest && this.#around.merging?.escrow) {
      this.#isUndecided = true;
      this.#around.merging.tellOperator(
        'The VM has ended before all of its memory was here. It can go on as it left its source: viper vm claim --from at ' +
          'its custodian. Or give that up, and start it from its disk: viper vm claim here, then viper vm start',
      );
      return;
    }
    // A QEMU whose guest waits for a page may say nothing at all.
    const hasArrived = this.state.name === 'arrived' || this.state.name === 'merging';
    const divided = this.#manifest !== undefined;
    // Before anything else: a VM whose stream went with the daemon before may need a page before it can be let run.
    if (found === 'loaded' || found === 'running' || (found === 'waiting' && hasArrived))
      this.#watchCompletion();
    await this.#tellEnd({ name: 'restarted', found, complete, divided }, complete || found === 'gone');
  }

  /** An operator's word that the source will not run the VM; or, where it has ended, that nobody is to go on with it. */
  async claim(reason: string): Promise<void> {
    if (this.#isUndecided) {
      this.#isUndecided = false;
      this.#tellEnd({ name: 'restarted', found: 'gone', complete: false, divided: true }, true).catch(
        () => {},
      );
      return;
    }
    // The custodian was asked and does not answer: it is gone for good, says the operator.
    if (this.#release && this.#isOurs) return this.#decided.resolve(undefined);
    await this.#engine.dispatch({ name: 'claim', reason });
  }

  /** It runs here, with somebody who may have to go on with it. */
  get #isOurs(): boolean {
    const { state } = this;
    return state.name === 'merging' || (state.name === 'arrived' && !state.complete);
  }

  /**
   * Before the VM counts as whole, or as ended, its disk has to be whole, and the custodian to give up its right to it. What
   * is missing of the disk relays hold, so the source need not wait for that.
   */
  async #tellEnd(event: DestinationEvent, isEnd: boolean): Promise<void> {
    const arrival = this.#arrival;
    if (arrival && isEnd && destinationOwns(this.state) && (await arrival.isPending())) {
      if (event.name === 'restarted' && event.complete)
        await this.#engine.dispatch({ ...event, complete: false, divided: true });
      else {
        const hasEnded = event.name === 'restarted' || event.name === 'vm-ended';
        await this.#engine.dispatch({ name: 'divided', hasEnded });
      }
      await arrival.settle(this.#machine);
      // A VM that has ended meanwhile is whole, too.
      if (event.name === 'restarted' && event.complete) return this.#engine.dispatch({ name: 'completed' });
    }
    const escrow = this.#around.merging?.escrow;
    if (escrow && isEnd && this.#isOurs) {
      this.#release ??= escrow.release(this.#abort.signal);
      const epoch = await Promise.race([this.#release, this.#decided.promise]);
      if (epoch !== undefined) return this.#engine.dispatch({ name: 'claimed', epoch });
    }
    await this.#engine.dispatch(event);
  }

  async #askCustodian(): Promise<void> {
    const escrow = this.#around.merging?.escrow;
    if (!escrow || this.#isAsking || !this.#isOurs) return;
    this.#isAsking = true;
    try {
      const epoch = await escrow.ask(this.#isUndecided);
      if (epoch !== undefined) this.#tell({ name: 'claimed', epoch });
    } finally {
      this.#isAsking = false;
    }
  }

  waitFor(wanted: (state: DestinationState) => boolean): Promise<DestinationState> {
    return this.#engine.waitFor(wanted);
  }

  /** Lets go of everything as a daemon does that ends: QEMU and the journal stay as they are. */
  async stop(): Promise<void> {
    this.#rest();
    this.#endStreams();
    await this.#arrival?.end({ drop: false });
    await this.#engine.stop();
  }

  #rest(): void {
    this.#stopped = true;
    clearInterval(this.#retry);
    clearTimeout(this.#ticket?.expiry);
    this.#abort.abort();
  }

  #tell(event: DestinationEvent): void {
    const isEnd = event.name === 'completed' || event.name === 'vm-ended';
    if (!this.#stopped) this.#tellEnd(event, isEnd).catch(() => {});
  }

  async #perform(effect: DestinationEffect): Promise<DestinationEvent | undefined> {
    switch (effect.name) {
      case 'make':
        return this.#make();
      case 'send-prepared':
        return this.#ticket && this.#send({ name: 'prepared', ticket: this.#ticket.ticket });
      case 'send-refused':
        return this.#send({ name: 'refused', problems: effect.problems });
      case 'send-committed':
        return this.#send({ name: 'committed', epoch: effect.epoch });
      case 'send-running':
        return this.#send({ ...effect, name: 'running' });
      case 'send-rejected':
        return this.#send({ name: 'rejected', reason: effect.reason });
      case 'send-gone':
        return this.#send({ name: 'gone' });
      case 'send-ask':
        return this.#send({ name: 'ask' });
      case 'send-unknown':
        return this.#send({ name: 'unknown' });
      case 'resume':
        return this.#resume();
      case 'tidy':
        // A QEMU that has died has no settings.
        if (this.#machine) await stopListening(this.#machine.qmp).catch(() => {});
        await this.#around.merging?.removeManifest();
        return undefined;
      case 'recover':
        return undefined;
      case 'end-vm':
        return this.#ended(await this.#endVm());
      case 'discard':
        await this.#discard();
        return { name: 'discarded' };
    }
  }

  async #send(message: ToSource): Promise<undefined> {
    // Lost messages are repeated, whatever lost them.
    await this.#around.send(message).then(
      () => message.name === 'running' && this.#heard.resolve(),
      () => {},
    );
  }

  async #make(): Promise<DestinationEvent> {
    const { storage, mode, engine } = this.#options;
    const channels = (engine ?? 'direct') === 'direct' ? this.#options.channels : 0;
    try {
      const arrival = this.#arrival;
      const machine = await this.#around.make(arrival && (() => arrival.listen()));
      this.#machine = machine;
      this.#watchEnd(machine);
      if (storage === 'copied' && !arrival) await serveDisk(machine.qmp, this.#socket('disk'));
      const socketPath = this.#socket('memory');
      await listenForMemory(machine.qmp, { socketPath, postcopy: mode !== 'precopy', channels });
      this.#watchLoading(machine);
    } catch (error) {
      const { code, message, details } = asAppError(error);
      const problem: Problem = { field: 'prepare', value: code, wanted: 'a QEMU that waits', message };
      return {
        name: 'make-failed',
        problems: [{ ...problem, ...(details.field ? { field: String(details.field) } : {}) }],
      };
    }
    const expiry = setTimeout(() => this.#tell({ name: 'expired' }), this.#ticketMs);
    this.#ticket = { ticket: this.#newTicket(), expiry };
    return { name: 'made' };
  }

  async #resume(): Promise<DestinationEvent | undefined> {
    const machine = this.#machine;
    const gone = (): DestinationEvent | undefined =>
      this.#arrival ? this.#ended({ name: 'vm-ended' }) : { name: 'vm-ended' };
    if (!machine) return gone();
    const mayLackPages = this.#options.mode !== 'precopy';
    const patience: { timeoutMs?: number } = mayLackPages ? { timeoutMs: pageTimeoutMs } : {};
    try {
      // QEMU takes them in this order, also when it can do neither yet.
      await Promise.all([this.#closeDisk(machine, patience), this.#vm.running && machine.resume(patience)]);
    } catch (error) {
      if (machine.qmp.state !== 'ready') return gone();
      // It has the word and waits for a page that is still at the source: it runs when that comes.
      if (mayLackPages && asAppError(error).code === 'timeout')
        return { name: 'resumed', complete: false, divided: this.#manifest !== undefined };
      const { running } = await machine.status().catch(() => ({ running: true }));
      if (!running) return { name: 'resume-refused', message: asAppError(error).message };
    }
    const { complete } = await this.#look(patience.timeoutMs);
    const divided = this.#manifest !== undefined;
    if (!complete || !(await this.#arrival?.isPending())) return { name: 'resumed', complete, divided };
    // Nobody else watches for the rest of it.
    this.#tell({ name: 'completed' });
    return { name: 'resumed', complete: false, divided: true };
  }

  /** Only one that cannot go on: the last pages may have been on their way when the source gave it up. */
  async #endVm(): Promise<DestinationEvent | undefined> {
    const machine = this.#machine;
    if (machine?.qmp.state === 'ready') {
      const status = await machine.qmp.execute('query-migrate').then(
        (info) => info.status,
        () => undefined,
      );
      if (status === 'completed') return { name: 'completed' };
      // The source says it again.
      if (status === 'postcopy-active') return undefined;
    }
    await machine?.kill();
    return { name: 'vm-ended' };
  }

  /**
   * What only counts when a custodian has been asked, or the disk is whole, comes by itself, for that may take as long as
   * others are away.
   */
  #ended(event: DestinationEvent | undefined): DestinationEvent | undefined {
    if (!event || !(this.#around.merging?.escrow || this.#arrival)) return event;
    this.#tell(event);
    return undefined;
  }

  async #discard(): Promise<void> {
    clearTimeout(this.#ticket?.expiry);
    await this.#machine?.kill();
    this.#endStreams();
    await this.#arrival?.end({ drop: true });
    for (const purpose of ['disk', 'memory'] as const)
      if (this.#machine) await rm(this.#socket(purpose), { force: true });
    this.#machine = null;
    await this.#around.discard();
  }

  /** Once, and again only if that failed. */
  #closeDisk({ qmp }: Machine, options: { timeoutMs?: number } = {}): Promise<void> {
    if (this.#options.storage !== 'copied' || this.#arrival) return Promise.resolve();
    this.#diskClosed ??= closeDisk(qmp, options).catch((error) => {
      this.#diskClosed = undefined;
      throw error;
    });
    return this.#diskClosed;
  }

  #watchEnd(machine: Machine): void {
    machine.exited.then(() => this.#tell({ name: 'vm-ended' }));
  }

  #watchLoading(machine: Machine): void {
    const { signal } = this.#abort;
    const watch = async (): Promise<void> => {
      const { complete } = await waitUntilLoaded(machine.qmp, signal);
      this.#around.onStep?.('loaded');
      // The source has ended its mirror before it let the last of the memory go, so this need not wait for the commit.
      if (complete) this.#closeDisk(machine).catch(() => {});
      this.#tell({ name: 'loaded', complete });
      if (!complete) this.#watchCompletion();
    };
    watch().catch((error) => {
      // A QEMU that has died tells its own end.
      if (machine.qmp.state === 'ready') this.#tell({ name: 'failed', message: asAppError(error).message });
    });
  }

  #watchCompletion(): void {
    const { qmp } = this.#machine!;
    waitUntilComplete(qmp, { signal: this.#abort.signal, whilePaused: () => this.#offerRecovery() }).then(
      () => this.#tell({ name: 'completed' }),
      () => {},
    );
  }

  /**
   * The stream of pages was lost: a new one may come, with a ticket of its own. If that one is lost as well, or QEMU
   * did not take it, so may another.
   */
  async #offerRecovery(): Promise<void> {
    const isTaking = this.#streams.size > 0 && performance.now() - this.#acceptedAt < this.#takeTimeoutMs;
    if (isTaking || this.#isPaused || this.#isMergingAlone || this.#isOffering) return;
    this.#isOffering = true;
    const silent = this.#silent;
    const socketPath = this.#socket('memory');
    try {
      if (silent) {
        await this.#findManifest();
        await this.#arrival?.reopen();
      }
      await rm(socketPath, { force: true });
      await (silent ? silent.recover(socketPath) : listenForRecovery(this.#machine!.qmp, socketPath));
      // Only now: one that says nothing has not said that its stream is lost, and refuses another one if it is not.
      if (this.#streams.size > 0) this.#takeTimeoutMs = Math.min(mostTakeTimeoutMs, this.#takeTimeoutMs * 2);
      this.#endStreams();
    } catch {
      // It is not yet done with the stream before; it is asked again as long as it says that it is paused.
      return;
    } finally {
      this.#isOffering = false;
    }
    if (this.#manifest) {
      this.#mergeAlone(socketPath);
      return;
    }
    this.#sessions.memory = 0;
    this.#ticket = { ticket: this.#newTicket(), expiry: undefined };
    this.#isPaused = true;
    this.#askForPages();
  }

  /** Without the source: an agent that knows the manifest. When it is lost, QEMU pauses again, and so does this. */
  #mergeAlone(socketPath: string): void {
    this.#isMergingAlone = true;
    this.#acceptedAt = performance.now();
    this.#rebuild(socketPath, undefined)
      .catch(() => {})
      .finally(() => {
        this.#isMergingAlone = false;
      });
  }

  #endStreams(): void {
    for (const stream of this.#streams) stream.destroy();
  }

  #askForPages(): void {
    if (this.#ticket) void this.#send({ name: 'recover', ticket: this.#ticket.ticket });
  }

  #newTicket(): Ticket {
    const expiresAt = new Date(Date.now() + this.#ticketMs).toISOString();
    return { secret: randomBytes(32).toString('hex'), expiresAt };
  }

  async #look(timeoutMs?: number): Promise<{ found: Found; complete: boolean }> {
    if (this.#machine?.qmp.state !== 'ready') return { found: 'gone', complete: false };
    const options = { signal: this.#abort.signal, ...(timeoutMs === undefined ? {} : { timeoutMs }) };
    try {
      const { loaded, complete, running } = await lookAt(this.#machine.qmp, options);
      return { found: !loaded ? 'waiting' : running ? 'running' : 'loaded', complete };
    } catch {
      return { found: 'waiting', complete: false };
    }
  }

  #isTicket(secret: string): boolean {
    if (!this.#ticket) return false;
    return timingSafeEqual(digest(secret), digest(this.#ticket.ticket.secret));
  }

  #socket(purpose: SessionPurpose): string {
    const { paths } = (this.#machine ?? this.#silent)!;
    return purpose === 'memory' ? paths.incoming : join(dirname(paths.qmp), 'disk.sock');
  }
}

const digest = (text: string): Buffer => createHash('sha256').update(text).digest();
