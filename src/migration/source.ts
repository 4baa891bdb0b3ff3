/**
 * The source's side of one migration: the pure machine of `source-machine.ts` with hands. It knows QEMU, and
 * everything else only by the few functions that it is given.
 */
import { once } from 'node:events';
import { rm } from 'node:fs/promises';
import type { Socket } from 'node:net';
import { dirname, join } from 'node:path';
import type { Duplex } from 'node:stream';
import { AppError, asAppError } from '../model/errors.ts';
import type { Uuid } from '../model/ids.ts';
import type {
  MigrationLimits,
  MigrationOptions,
  MigrationProgress,
  MigrationResult,
  VmToMove,
} from '../model/migration.ts';
import { digestBytes, MemoryIndex, noBlock, type SetIndex, type SetName } from '../pages/index.ts';
import { delay, type MigrationStatus, type QmpConnection, type QmpEvent } from '../qmp/index.ts';
import type { RelayHolds } from '../relay/index.ts';
import type { Machine } from '../vm/machine.ts';
import { findDevicePages } from './condensed/device-pages.ts';
import { mirroredSet } from './condensed/disk-frames.ts';
import { DiskSource } from './condensed/disk-source.ts';
import { GuestMemory, type GuestRam } from './condensed/guest-memory.ts';
import { SourceAgent, type SourceAgentOptions } from './condensed/source-agent.ts';
import { noStatistics } from './condensed/statistics.ts';
import { diskMarkOf, markDisk, unmarkDisk } from './disk-mark.ts';
import { type Door, joinStreams, openDoor } from './doors.ts';
import { Engine, type Journal } from './engine.ts';
import {
  dropMemoryOut,
  isBoundToPostcopy,
  letGo,
  type MemoryAgent,
  resumePostcopy,
  sendMemory,
  setLimits,
  unlimitedBytesPerSecond,
} from './memory-out.ts';
import { dropMirror, finishMirror, setMirrorSpeed, startMirror, waitUntilMirrored } from './mirror.ts';
import { ProgressTracker } from './progress.ts';
import type { Ticket, ToDestination, ToSource } from './protocol.ts';
import { endReadBack, ReadBack } from './read-back.ts';
import { DiskDivider } from './relayed/disk-divider.ts';
import { Divider } from './relayed/divider.ts';
import type { Pool } from './relayed/pool.ts';
import { sumOfDivisions } from './relayed/statistics.ts';
import {
  isSourceOver,
  type SourceEffect,
  type SourceEvent,
  type SourceState,
  sourceTransition,
} from './source-machine.ts';

export type SessionPurpose = 'disk' | 'memory';

export interface SourceSurroundings {
  journal: Journal<SourceState>;
  /** Sends a message; it may be lost, and a failure means no more than that. */
  send: (message: ToDestination) => Promise<void>;
  /** Opens a session to the destination by its ticket. */
  openSession: (purpose: SessionPurpose, ticket: Ticket, signal: AbortSignal) => Promise<Duplex>;
  /** A session of a group of slabs with a relay. Missing where nothing is relayed. */
  openRelay?: (id: Uuid, group: string, holds: RelayHolds) => Promise<Duplex>;
  /** Of VMs that leave at the same time and may share slabs; asked once for each division. Missing: with none. */
  pool?: () => Pool | undefined;
  /** The index of a reference set that the destination holds; `undefined` when it is not known here. */
  openIndex?: (name: SetName) => Promise<SetIndex | undefined>;
  /** Keeps the memory of the VM, which has left, for its way back. Missing where nothing is kept. */
  keepMemory?: ((ram: GuestRam) => Promise<void>) | undefined;
  /** Removes the VM from this cloudlet, its files first of all; its QEMU has ended. Gone already is no error. */
  discard: () => Promise<void>;
  onState?: (state: SourceState) => void;
  onProgress?: (progress: MigrationProgress) => void;
  /** The vCPUs have stopped here, and mostly for good: nothing may hold the migration up now. */
  onStopped?: () => void;
  /** What goes on within a state, for those who look where time goes. */
  onStep?: (step: string, facts?: Record<string, number>) => void;
  tellOperator: (message: string) => void;
  onFailure: (error: AppError) => void;
}

export interface SourceMigrationOptions {
  id: Uuid;
  vm: VmToMove;
  options: MigrationOptions;
  state: SourceState;
  /** `null` if it has ended. */
  machine: Machine | null;
  surroundings: SourceSurroundings;
  /** How often an answer that does not come is asked for. */
  retryMs?: number;
}

const undoTimeoutMs = 30_000;
const journalRetryMs = 1000;
/** 2 GiB of mirrored content that memory and later writes can refer to; takes about 50 MB when full. */
const mostMirroredBlocks = 2 ** 19;

export class SourceMigration {
  readonly #id: Uuid;
  readonly #vm: VmToMove;
  readonly #machine: Machine | null;
  readonly #around: SourceSurroundings;
  readonly #engine: Engine<SourceState, SourceEvent, SourceEffect>;
  readonly #tracker: ProgressTracker;
  readonly #retry: NodeJS.Timeout;
  readonly #unsubscribe: () => void;
  #options: MigrationOptions;
  #doors: Door[] = [];
  #agent: SourceAgent | undefined;
  #diskAgent: DiskSource | undefined;
  #mirrored: MemoryIndex | undefined;
  /** QEMU has ended the mirror. */
  #isMirrored = false;
  #agentLink: Duplex | undefined;
  #divider: Divider | undefined;
  /** From when the destination prepares until its memory session is there. */
  #opening: Promise<Divider | undefined> | undefined;
  #diskDivider: DiskDivider | undefined;
  #readBack: ReadBack | undefined;
  #diskSession: Duplex | undefined;
  #copy: { abort: AbortController; done: Promise<void> } | undefined;
  #isRecovering = false;
  /** Of the ticket by which post-copy went on last. */
  #recoverySecret: string | undefined;
  /** Since this daemon let QEMU go past the pause of a post-copy. */
  #wasLetGo = false;
  #stopped = false;
  #hasStopped = false;

  constructor({ id, vm, options, state, machine, surroundings, retryMs = 1000 }: SourceMigrationOptions) {
    this.#id = id;
    this.#vm = vm;
    this.#options = options;
    this.#machine = machine;
    this.#around = surroundings;
    this.#tracker = new ProgressTracker({
      memoryBytes: vm.spec.memoryBytes,
      diskBytes: options.storage === 'shared' ? 0 : vm.diskBytes,
    });
    this.#engine = new Engine({
      state,
      transition: sourceTransition,
      journal: surroundings.journal,
      perform: (effect) => this.#perform(effect),
      onState: (next) => {
        if (next.name === 'switching') this.#tracker.enter('switchover');
        if (next.name === 'serving') this.#tracker.enter('postcopy');
        if (next.name === 'moved') this.#tracker.enter('done');
        surroundings.onState?.(next);
        this.#report();
      },
      onFailure: surroundings.onFailure,
    });
    this.#retry = setInterval(() => {
      if (this.#engine.isIdle) this.#tell({ name: 'retry' });
    }, retryMs);
    this.#unsubscribe = machine?.qmp.onEvent((event) => this.#watch(event)) ?? (() => {});
    machine?.exited.then(() => this.#tell({ name: 'vm-ended' }));
  }

  get state(): SourceState {
    return this.#engine.state;
  }

  get progress(): MigrationProgress {
    return this.#tracker.progress;
  }

  get result(): MigrationResult {
    return this.#tracker.result;
  }

  /** It copies while the VM runs, and may take its time. */
  get canBePaused(): boolean {
    return !this.#hasStopped && ['planned', 'preparing', 'copying'].includes(this.state.name);
  }

  /** Begins; resolves when the destination was asked. */
  start(): Promise<void> {
    return this.#engine.dispatch({ name: 'start' });
  }

  /** Goes on from the journal after the daemon was away: continues or rolls back by itself. */
  restart(): Promise<void> {
    return this.#engine.dispatch({ name: 'restarted' });
  }

  /** Resolves when the VM runs here as before. `wrong_state` once the VM is the destination's. */
  cancel(): Promise<void> {
    return this.#engine.dispatch({ name: 'cancel' });
  }

  /** An operator's word that the destination will not run the VM. */
  claim(reason: string): Promise<void> {
    return this.#engine.dispatch({ name: 'claim', reason });
  }

  /** Takes a message of the destination. */
  async receive(message: ToSource): Promise<void> {
    if (message.name === 'running') {
      this.#tracker.resumed();
      if (message.cost) this.#tracker.costThere(message.cost);
    }
    if (message.name === 'recover') return this.#recover(message.ticket);
    await this.#engine.dispatch(this.#isDiskSafe ? message : asUnfinished(message));
  }

  /** As far as it went to relays from here: until enough of them hold all of it, this side is needed. */
  get #isDiskSafe(): boolean {
    return this.#diskDivider?.isSafe ?? true;
  }

  /** The destination cannot be reached: a migration that was undone here need not wait for it. */
  async giveUp(): Promise<void> {
    await this.#engine.dispatch({ name: 'give-up' });
  }

  async setLimits(limits: MigrationLimits): Promise<void> {
    this.#options = { ...this.#options, limits };
    if (!this.#machine || !this.#copy) return;
    await setLimits(this.#machine.qmp, this.#limitsOfQemu());
    await setMirrorSpeed(this.#machine.qmp, mirrorSpeed(this.#limitsOfQemu()));
  }

  /** The first state, now or later, that is wanted. */
  waitFor(wanted: (state: SourceState) => boolean): Promise<SourceState> {
    return this.#engine.waitFor(wanted);
  }

  waitUntilOver(): Promise<SourceState> {
    return this.waitFor(isSourceOver);
  }

  /** Lets go of everything as a daemon does that ends: QEMU and the journal stay as they are. */
  async stop(): Promise<void> {
    this.#stopped = true;
    clearInterval(this.#retry);
    this.#unsubscribe();
    // First of all no effect begins any more.
    const stopped = this.#engine.stop();
    this.#copy?.abort.abort();
    await this.#closeDoors();
    await this.#copy?.done;
    await stopped;
    await this.#closeDoors();
    this.#endDividers({ drop: false });
  }

  #watch(event: QmpEvent): void {
    if (event.name === 'STOP') {
      this.#hasStopped = true;
      this.#tracker.paused();
      this.#step('stopped');
      this.#agent?.hurry(true);
      this.#around.onStopped?.();
    }
    if (event.name === 'RESUME') this.#agent?.hurry(false);
    if (event.name === 'MIGRATION' && event.data.status === 'postcopy-active')
      this.#tracker.enteredPostcopy();
  }

  /** Events that nobody waits for. Refusals cannot come of them, and failures have their own way. */
  #tell(event: SourceEvent): void {
    if (!this.#stopped) this.#engine.dispatch(event).catch(() => {});
  }

  async #perform(effect: SourceEffect): Promise<SourceEvent | undefined> {
    switch (effect.name) {
      case 'send-prepare':
        // Relays need not wait for the destination, where no disk goes before the memory.
        if (this.#options.storage !== 'copied') this.#opening ??= this.#openDivider();
        return this.#send({ name: 'prepare', vm: this.#vm, options: this.#options });
      case 'send-commit':
        return this.#send({ name: 'commit', epoch: effect.epoch });
      case 'send-abort':
        return this.#send({ name: 'abort', epoch: effect.epoch });
      case 'send-pages-lost':
        return this.#send({ name: 'pages-lost' });
      case 'send-done':
        return this.#send({ name: 'done' });
      case 'copy':
        this.#beginCopy(effect.ticket);
        return undefined;
      case 'continue':
        await this.#orReport('QEMU did not go on with the post-copy', () => this.#letGo());
        return undefined;
      case 'undo':
        await this.#returnToNormal();
        return { name: 'undone' };
      case 'take-back':
        await this.#takeBack();
        return { name: 'taken-back' };
      case 'serve':
        return this.#serve();
      case 'discard':
        await this.#leave();
        return { name: 'discarded' };
      case 'tell-operator':
        this.#around.tellOperator(effect.message);
        return undefined;
    }
  }

  async #send(message: ToDestination): Promise<undefined> {
    // Lost messages are repeated, whatever lost them.
    await this.#around.send(message).catch(() => {});
  }

  /** Runs beside the engine, which stays free for a cancel. `done` waits for the copy alone, as the undo does. */
  #beginCopy(ticket: Ticket): void {
    const abort = new AbortController();
    const copied = this.#copyAll(ticket, abort.signal);
    const done = copied.catch(() => {});
    this.#copy = { abort, done };
    copied
      .then(() => this.#engine.dispatch({ name: 'release' }))
      .catch((error) => this.#reportFailure(asAppError(error).message, abort.signal))
      // Cancelled, by a user or by the end of the daemon.
      .catch(() => {});
  }

  /**
   * Repeats itself while the journal cannot be written, for the VM may stand still: whether a release reached the
   * disk is not known then, and only a later word in the journal makes it safe to let the VM run.
   */
  async #reportFailure(message: string, signal: AbortSignal): Promise<void> {
    while (!signal.aborted) {
      try {
        return await this.#engine.dispatch({ name: 'failed', message });
      } catch (error) {
        this.#around.tellOperator(`The migration cannot be undone yet: ${asAppError(error).message}`);
        await delay(journalRetryMs, signal);
      }
    }
  }

  async #copyAll(ticket: Ticket, signal: AbortSignal): Promise<void> {
    const { qmp } = this.#machine!;
    const { mode, storage, channels } = this.#options;
    const isCondensed = this.#isCondensed;
    const limits = () => this.#limitsOfQemu();
    const isCopied = storage === 'copied';
    const broken = Promise.withResolvers<never>();
    broken.promise.catch(() => {});
    const door = async (purpose: SessionPurpose): Promise<string> => {
      const path = this.#socket(purpose);
      const early = purpose === 'disk' ? await this.#openDiskSession(ticket, signal) : undefined;
      const opened = await openDoor(path, async (socket) => {
        const session = early ?? (await this.#around.openSession(purpose, ticket, signal));
        this.#step(`${purpose} session`);
        if (purpose === 'memory' && isCondensed) await this.#condense(session, socket);
        else if (this.#options.relayed?.diskRelays) await this.#divideDisk(session, socket);
        else if (isCondensed) await this.#condenseDisk(session, socket);
        else {
          if (early) passOn(early, socket);
          await joinStreams(session, socket);
        }
      });
      this.#doors.push(opened);
      // QEMU's own error follows; this one says why.
      opened.broken.catch(broken.reject);
      return path;
    };
    if (isCopied) {
      this.#tracker.enter('disk');
      while (!(await this.#startMirror(await door('disk'), signal)));
      // They may have been changed while there was no job to tell.
      await setMirrorSpeed(qmp, mirrorSpeed(this.#limitsOfQemu()));
      await waitUntilMirrored(qmp, {
        signal,
        onProgress: (progress) => {
          this.#tracker.disk(progress);
          this.#tellCondensed();
          this.#report();
        },
      }).catch((error) => {
        // QEMU only says that its mirror failed.
        throw this.#diskDivider?.failure ?? error;
      });
    }
    this.#tracker.enter('memory');
    await sendMemory(qmp, {
      socketPath: await door('memory'),
      // Relays take what there is from the first round on, and then it is time.
      mode: this.#options.engine === 'relayed' ? 'postcopy' : mode,
      limits,
      channels: isCondensed ? 0 : channels,
      signal,
      ...(isCondensed && { agent: this.#paceOfAgent() }),
      onInfo: (info) => {
        this.#tracker.memory(info);
        this.#tellCondensed();
        this.#report();
      },
      whenPaused: async () => {
        this.#step('pre-switchover');
        this.#tracker.enter('switchover');
        if (isCopied) await finishMirror(qmp, signal);
        await this.#diskDivider?.end(signal);
        this.#isMirrored = true;
        if (this.#diskMark) await markDisk(qmp, this.#diskMark);
      },
    });
  }

  /** False if the link was cut while QEMU and the server of the disk greeted each other: QEMU is let go, to try again. */
  async #startMirror(socketPath: string, signal: AbortSignal): Promise<boolean> {
    const { qmp } = this.#machine!;
    try {
      await startMirror(qmp, {
        socketPath,
        signal,
        speedBytesPerSecond: mirrorSpeed(this.#limitsOfQemu()),
        wholeDisk: this.#vm.wholeDisk === true,
      });
      return true;
    } catch (error) {
      if (signal.aborted || asAppError(error).code !== 'timeout') throw error;
      await this.#closeDoors();
      await dropMirror(qmp, signal);
      return false;
    }
  }

  /**
   * With the first words of the destination: QEMU answers nothing while it waits for those of an NBD server, and its guest
   * stands still, which must not last as long as a cut of the link.
   */
  async #openDiskSession(ticket: Ticket, signal: AbortSignal): Promise<Duplex> {
    const session = await this.#around.openSession('disk', ticket, signal);
    this.#diskSession = session;
    // Until QEMU is joined with it; then it meets what went wrong.
    session.on('error', () => {});
    await once(session, 'readable', { signal });
    return session;
  }

  /** Every trace of the copy goes from QEMU, and the VM runs if it ran. */
  async #returnToNormal(): Promise<void> {
    this.#copy?.abort.abort();
    // A QEMU that waits for the disk's server answers when that is gone. With memory on its way, closed doors would make
    // it fail before it is told to end.
    if (!this.#memoryDoor) await this.#closeDoors();
    await this.#copy?.done;
    this.#copy = undefined;
    const machine = this.#machine;
    if (machine && machine.qmp.state === 'ready') {
      const signal = AbortSignal.timeout(undoTimeoutMs);
      await this.#orReport('QEMU did not end the copy of the memory', () =>
        dropMemoryOut(machine.qmp, signal),
      );
      // First of all the VM: what else is to be undone does not hold it up.
      if (this.#vm.running)
        await this.#orReport('The VM does not run again; try viper vm resume', () => machine.resume());
      await this.#orReport('QEMU did not end the copy of the disk', () => dropMirror(machine.qmp, signal));
      const mark = this.#diskMark;
      if (mark) await this.#orReport('A snapshot is left in the disk', () => unmarkDisk(machine.qmp, mark));
    }
    await this.#closeDoors();
    // Nobody will come for what it has given away.
    this.#endDividers({ drop: true });
    if (machine?.qmp.state === 'ready' && this.#options.relayed?.diskRelays)
      await this.#orReport('QEMU did not end its server of the disk', () => endReadBack(machine.qmp));
    // Those of an earlier daemon, of which only the names are left.
    if (machine)
      for (const purpose of ['disk', 'memory'] as const) await rm(this.#socket(purpose), { force: true });
  }

  /** For whoever may have to go on with the VM as it is when it leaves. */
  get #diskMark(): string | undefined {
    return this.#options.relayed?.custodian && diskMarkOf(this.#id);
  }

  get #memoryDoor(): Door | undefined {
    return this.#doors.find(({ path }) => path === this.#socket('memory'));
  }

  /** A stream that has ended takes no last state: its destination rejects, and finds QEMU free to be taken back. */
  async #letGo(): Promise<void> {
    if (!this.#memoryDoor || this.#memoryDoor.isBroken) return;
    this.#wasLetGo = true;
    await letGo(this.#machine!.qmp);
  }

  async #takeBack(): Promise<void> {
    const machine = this.#machine;
    await this.#closeDoors();
    if (machine?.qmp.state === 'ready' && (await this.#isBound(machine.qmp))) {
      await machine.kill();
      this.#around.tellOperator(
        'The destination could not load the VM in post-copy, and QEMU cannot take a post-copy back: ' +
          'the VM has crashed at the source and can be started from its disk',
      );
      return;
    }
    await this.#returnToNormal();
  }

  /** One that does not answer at all is no more than that; `returnToNormal` reports it. */
  #isBound(qmp: QmpConnection): Promise<boolean> {
    const signal = AbortSignal.timeout(undoTimeoutMs);
    return isBoundToPostcopy(qmp, { wasLetGo: this.#wasLetGo, signal }).catch(() => false);
  }

  /**
   * The destination asks for a new session when it misses the old one, so here is only to look. A QEMU that loses its
   * stream between its last page and the destination's thanks does not wait for another but fails (its `migration_completion`).
   */
  async #serve(): Promise<SourceEvent | undefined> {
    const machine = this.#machine;
    if (machine?.qmp.state !== 'ready') return { name: 'vm-ended' };
    let status: MigrationStatus | undefined;
    await this.#orReport('QEMU does not say how far the pages are', async () => {
      const info = await machine.qmp.execute('query-migrate');
      status = info.status;
      this.#tracker.memory(info);
    });
    this.#report();
    return status === 'failed' ? { name: 'cannot-serve' } : undefined;
  }

  /** Post-copy goes on over a new session; the destination repeats its wish until it does. */
  async #recover(ticket: Ticket): Promise<void> {
    const machine = this.#machine;
    if (!machine || this.#isRecovering || !(await this.#mayServePages(machine))) return;
    // The wish may have been repeated before its session arrived, which another one would break.
    const isServing = this.#isCondensed
      ? this.#agentLink?.destroyed === false
      : this.#memoryDoor && !this.#memoryDoor.isBroken;
    if (ticket.secret === this.#recoverySecret && isServing) return;
    this.#isRecovering = true;
    this.#recoverySecret = ticket.secret;
    const signal = AbortSignal.timeout(undoTimeoutMs);
    try {
      // The disk is told of over a session of its own.
      await this.#closeDoors({ keepsDisk: true });
      if (this.#isCondensed) {
        const link = await this.#around.openSession('memory', ticket, signal);
        // At once: a wish that is repeated meanwhile must find it at work.
        this.#agentLink = link;
        this.#condense(link).catch(() => {
          // The destination notices, and asks again.
          link.destroy();
        });
        return;
      }
      const socketPath = this.#socket('memory');
      const serve = async (socket: Socket) =>
        joinStreams(await this.#around.openSession('memory', ticket, signal), socket);
      this.#doors.push(await openDoor(socketPath, serve));
      await resumePostcopy(machine.qmp, { socketPath, signal });
    } finally {
      this.#isRecovering = false;
    }
  }

  /** Also before the word that the VM runs there: what it waits for on its way there may be a page. */
  async #mayServePages({ qmp }: Machine): Promise<boolean> {
    if (this.state.name === 'serving') return true;
    if (this.state.name !== 'switching' || this.#options.mode === 'precopy') return false;
    if (this.#isCondensed) return true;
    // One that has not begun post-copy would lose its stream, and with it the way back.
    const { status } = await qmp.execute('query-migrate');
    return status?.startsWith('postcopy-') ?? false;
  }

  get #isCondensed(): boolean {
    return (this.#options.engine ?? 'direct') !== 'direct';
  }

  /** What QEMU writes is not what the link carries, so the rate is held at the link. */
  #limitsOfQemu(): MigrationLimits {
    const { bandwidthBps, ...others } = this.#options.limits;
    return this.#isCondensed || bandwidthBps === undefined ? others : this.#options.limits;
  }

  /** The mirror's writes, condensed. Resolves when QEMU has taken its leave. */
  async #condenseDisk(link: Duplex, qemu: Socket): Promise<void> {
    this.#mirrored = new MemoryIndex({ maxEntries: mostMirroredBlocks });
    this.#diskAgent = new DiskSource({
      qemu,
      link,
      openIndex: (name) => this.#openIndex(name),
      mirrored: this.#mirrored,
      limitBps: () => this.#options.limits.bandwidthBps,
      statistics: noStatistics(),
    });
    await this.#diskAgent.run();
  }

  #openIndex(name: SetName): Promise<SetIndex | undefined> {
    return this.#around.openIndex?.(name) ?? Promise.resolve(undefined);
  }

  /**
   * What memory may refer to on the destination's disk: as long as the mirror goes on. In post-copy the destination has
   * closed it to us, and each reference would cost a round trip.
   */
  #whatIsMirrored(): SetIndex | undefined {
    const mirrored = this.#mirrored;
    if (!mirrored) return undefined;
    return {
      entries: mirrored.entries,
      lookup: async (digests) => {
        if (this.#isMirrored && this.#options.mode !== 'precopy')
          return new Uint32Array(digests.length / digestBytes).fill(noBlock);
        const found = await mirrored.lookup(digests);
        return found.map((block) => (this.#diskAgent?.isPending(block) ? noBlock : block));
      },
      async [Symbol.asyncDispose]() {},
    };
  }

  #step(step: string, facts?: Record<string, number>): void {
    this.#around.onStep?.(step, facts);
  }

  /** Of the agent that there is by then. */
  #paceOfAgent(): MemoryAgent {
    const agent = () => this.#agent;
    return {
      drain: () => {
        this.#step('drain');
        agent()?.drain();
      },
      noteRound: (round, remainingBytes) => {
        agent()?.noteRound(round);
        const { changesPerSecond = 0 } = agent() ?? {};
        this.#step('round', { round, remainingBytes, changesPerSecond: Math.round(changesPerSecond) });
      },
      get isSampled() {
        return agent()?.isSampled ?? false;
      },
      get isBehind() {
        return agent()?.isBehind ?? true;
      },
      get changesPerSecond() {
        return agent()?.changesPerSecond;
      },
    };
  }

  #tellCondensed(): void {
    const [memory, disk] = [this.#agent?.statistics, (this.#diskDivider ?? this.#diskAgent)?.statistics];
    this.#tracker.condensed({ ...(memory && { memory }), ...(disk && { disk }) });
    const [divided, ofDisk] = [this.#divider?.statistics, this.#diskDivider?.division];
    if (divided) this.#tracker.relayed(ofDisk ? sumOfDivisions(divided, ofDisk) : divided);
  }

  /** Without `qemu` a post-copy goes on, out of the memory alone. Resolves when the destination has everything. */
  async #condense(link: Duplex, qemu?: Duplex): Promise<void> {
    const { process, qmp } = this.#machine!;
    this.#agentLink = link;
    const statistics = this.#agent?.statistics ?? noStatistics();
    const { mode } = this.#options;
    const memory = await GuestMemory.open(process.pid, qmp).catch((error) => {
      statistics.fallback = asAppError(error).message;
      return undefined;
    });
    // What an earlier one has placed is nobody's any more: its destination has said what it lacks.
    this.#divider?.end({ drop: true });
    this.#divider = await this.#takeDivider(memory !== undefined);
    const options: SourceAgentOptions = {
      link,
      qemu,
      memory,
      ...(memory && qemu && mode !== 'precopy' && { devicePages: findDevicePages(qmp, memory.mapped) }),
      mode: !qemu ? 'resume' : mode === 'precopy' ? 'precopy' : 'postcopy',
      // Relays take everything: no round goes to a destination that may be slow.
      drainAtOnce: mode === 'postcopy' || this.#divider !== undefined,
      dividesFirst: mode !== 'postcopy',
      dividesAll: this.#options.relayed?.custodian !== undefined,
      openIndex: async (name) => (name === mirroredSet ? this.#whatIsMirrored() : this.#openIndex(name)),
      keeps: memory !== undefined && this.#keepsMemory,
      divider: this.#divider,
      limitBps: () => this.#options.limits.bandwidthBps,
      statistics,
      onStep: (step, facts) => this.#step(step, facts),
    };
    const agent = new SourceAgent(options);
    this.#agent = agent;
    try {
      await agent.run();
    } finally {
      this.#tellCondensed();
      await memory?.[Symbol.asyncDispose]();
    }
  }

  /** The mirror's writes, for relays. Resolves when QEMU has taken its leave. */
  async #divideDisk(link: Duplex, qemu: Socket): Promise<void> {
    const { diskRelays, replicas } = this.#options.relayed!;
    const relays = diskRelays!.map(({ id, name }) => ({
      id,
      name,
      open: (group: string) => this.#around.openRelay!(id, group, 'disk'),
    }));
    // What an earlier one has placed is nobody's any more.
    this.#diskDivider?.close({ drop: true });
    const divider = new Divider({ migrationId: this.#id, relays, replicas });
    await divider.open();
    this.#readBack ??= new ReadBack(this.#machine!.qmp, this.#socket('disk'));
    const readBack = this.#readBack;
    this.#diskDivider = new DiskDivider({
      qemu,
      link,
      divider,
      readBack: (offset, lengthBytes) => readBack.read(offset, lengthBytes),
      isPaused: () => this.#options.limits.paused === true,
    });
    await this.#diskDivider.run();
  }

  #endDividers(how: { drop: boolean }): void {
    this.#opening?.then((divider) => divider?.end(how)).catch(() => {});
    this.#divider?.end(how);
    this.#diskDivider?.close(how);
    this.#readBack?.close();
  }

  /** The one that is being opened, or another one. */
  async #takeDivider(isOfUse: boolean): Promise<Divider | undefined> {
    const opening = this.#opening ?? (isOfUse ? this.#openDivider() : undefined);
    this.#opening = undefined;
    const divider = await opening;
    if (!isOfUse) divider?.end({ drop: true });
    return isOfUse ? divider : undefined;
  }

  async #openDivider(): Promise<Divider | undefined> {
    const { engine, relayed } = this.#options;
    const { openRelay } = this.#around;
    if (engine !== 'relayed' || !relayed || !openRelay) return undefined;
    const relays = relayed.relays.map(({ id, name }) => ({
      id,
      name,
      open: (group: string) => openRelay(id, group, 'memory'),
    }));
    const divider = new Divider({
      migrationId: this.#id,
      relays,
      replicas: relayed.replicas,
      // What a custodian is given stands on itself.
      pool: relayed.custodian ? undefined : this.#around.pool?.(),
    });
    await divider.open();
    return divider;
  }

  /** One that leaves by way of relays leaves for good: its host may be switched off. */
  get #keepsMemory(): boolean {
    return this.#options.engine === 'condensed' && this.#around.keepMemory !== undefined;
  }

  /** What cannot be kept costs bytes on the way back, and nothing now. */
  async #keepMemory({ process, qmp }: Machine): Promise<void> {
    const { keepMemory } = this.#around;
    if (!keepMemory) return;
    try {
      await using memory = await GuestMemory.open(process.pid, qmp);
      await keepMemory(memory);
    } catch (error) {
      if (!(error instanceof AppError)) throw error;
    }
  }

  async #leave(): Promise<void> {
    this.#tellCondensed();
    if (this.#machine) {
      const { qmp } = this.#machine;
      await qmp.execute('query-migrate').then(
        (info) => this.#tracker.memory(info),
        () => {},
      );
      if (this.#keepsMemory) await this.#keepMemory(this.#machine);
      await this.#machine.kill();
    }
    await this.#copy?.done;
    await this.#closeDoors();
    this.#endDividers({ drop: false });
    await this.#around.discard();
  }

  async #closeDoors({ keepsDisk = false } = {}): Promise<void> {
    for (const door of this.#doors.splice(0)) await door[Symbol.asyncDispose]();
    this.#agentLink?.destroy();
    if (!keepsDisk || !this.#diskDivider) this.#diskSession?.destroy();
  }

  #socket(purpose: SessionPurpose): string {
    return join(dirname(this.#machine!.paths.qmp), `to-${purpose}.sock`);
  }

  /** A step that fails must not keep the next ones from being done, and a human may have to look at it. */
  async #orReport(whatFails: string, step: () => Promise<unknown>): Promise<void> {
    try {
      await step();
    } catch (error) {
      if (this.#machine?.qmp.state === 'ready')
        this.#around.tellOperator(`${whatFails}: ${asAppError(error).message}`);
    }
  }

  #report(): void {
    this.#around.onProgress?.(this.#tracker.progress);
    if (isSourceOver(this.#engine.state)) clearInterval(this.#retry);
  }
}

/** One that is whole needs nobody; for any other, relays do not have enough yet. */
function asUnfinished(message: Exclude<ToSource, { name: 'recover' }>): typeof message {
  if (message.name !== 'running') return message;
  const { divided: _, ...running } = message;
  return running;
}

/** What was awaited of the stream before it is joined with the socket. */
function passOn(stream: Duplex, socket: Socket): void {
  for (let bytes = stream.read(); bytes !== null; bytes = stream.read()) socket.write(bytes);
}

const mirrorSpeed = ({ bandwidthBps }: MigrationLimits): number =>
  bandwidthBps === undefined ? unlimitedBytesPerSecond : Math.max(1, Math.floor(bandwidthBps / 8));
