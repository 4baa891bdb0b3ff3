/**
 * What the destination does with QEMU for a migration: makes one that waits, watches it load, lets it run, and ends it. What
 * comes into it is in `streams-in.ts`; whether and when, `destination.ts` says.
 */
import { rm } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { asAppError } from '../model/errors.ts';
import type { MergeStatistics, MigrationOptions, MigrationProgress, VmToMove } from '../model/migration.ts';
import type { Machine } from '../vm/machine.ts';
import { AgentsIn, type AgentsInSurroundings, type MergingSurroundings } from './agents-in.ts';
import type { DestinationEvent, Found } from './destination-machine.ts';
import { DiskArrival, type DiskArrivalOptions } from './disk-arrival.ts';
import {
  closeDisk,
  listenForMemory,
  lookAt,
  serveDisk,
  stopListening,
  waitUntilComplete,
  waitUntilLoaded,
} from './memory-in.ts';
import type { Problem, SessionPurpose, Ticket } from './protocol.ts';
import type { Custody } from './relayed/custody.ts';
import { sumOfMerges } from './relayed/statistics.ts';
import { type SilentQemu, StreamsIn } from './streams-in.ts';

export interface ArrivalSurroundings extends AgentsInSurroundings {
  /**
   * Makes the VM's directory, its empty disk on the same image (unless shared) and a QEMU that waits for it. `listen`: what
   * lies under the disk is served by us, from before QEMU opens it.
   */
  make: (listen?: () => Promise<void>) => Promise<Machine>;
  merging?: MergingSurroundings & {
    /** Where the disk comes by way of relays as well. */
    disk?: Omit<DiskArrivalOptions, 'sizeBytes' | 'openRelay' | 'tellOperator'> | undefined;
  };
}

export interface ArrivalOptions {
  vm: VmToMove;
  wanted: MigrationOptions;
  machine: Machine | null;
  silent: SilentQemu | undefined;
  surroundings: ArrivalSurroundings;
  /** How long the source may take to come with the ticket. */
  ticketMs: number;
  custody: Custody | undefined;
  /** QEMU waits for its first stream. */
  isWaiting: () => boolean;
  /** It runs here, with somebody who may have to go on with it. */
  isOurs: () => boolean;
  /** The source is to come with this ticket, and the pages that are missing. */
  askForPages: (ticket: Ticket) => void;
  tell: (event: DestinationEvent) => void;
  signal: AbortSignal;
}

/**
 * QEMU answers nothing while one of its devices waits for a page, which may be for as long as the link is cut. Then
 * what is to be done about that must not wait behind the question.
 */
const pageTimeoutMs = 5000;

export class Arrival {
  readonly #options: ArrivalOptions;
  readonly #around: ArrivalSurroundings;
  readonly #streams: StreamsIn;
  readonly #agents: AgentsIn;
  /** One that comes by way of relays. */
  readonly #disk: DiskArrival | undefined;
  #machine: Machine | null;
  #silent: SilentQemu | undefined;
  #diskClosed: Promise<void> | undefined;

  constructor(options: ArrivalOptions) {
    this.#options = options;
    const { wanted, surroundings, custody, isOurs, tell } = options;
    this.#around = surroundings;
    this.#machine = options.machine;
    this.#silent = options.silent;
    this.#disk = this.#newDisk();
    this.#agents = new AgentsIn({
      surroundings,
      isRelayed: wanted.engine === 'relayed',
      custody,
      isOurs,
      onDivided: () => tell({ name: 'divided' }),
    });
    this.#streams = new StreamsIn({
      wanted,
      agents: this.#agents,
      disk: this.#disk,
      qemu: () => ({ machine: this.#machine, silent: this.#silent }),
      socketPath: (purpose) => this.#socket(purpose),
      ticketMs: options.ticketMs,
      isWaiting: options.isWaiting,
      askForPages: options.askForPages,
      onStep: surroundings.onStep,
    });
    if (this.#machine) this.#watchEnd(this.#machine);
  }

  #newDisk(): DiskArrival | undefined {
    const { vm, wanted } = this.#options;
    const { merging } = this.#around;
    if (!wanted.relayed?.diskRelays || !merging?.disk) return undefined;
    return new DiskArrival({
      ...merging.disk,
      sizeBytes: vm.spec.disk.sizeBytes,
      openRelay: (id, group) => merging.openRelay(id, group, 'disk'),
      tellOperator: merging.tellOperator,
    });
  }

  /** The streams that the source brings. */
  get streams(): StreamsIn {
    return this.#streams;
  }

  /** Where all of the memory is that is missing is known here: the source is not needed any more. */
  get isDivided(): boolean {
    return this.#agents.manifest !== undefined;
  }

  get hasDisk(): boolean {
    return this.#disk !== undefined;
  }

  /** Whether blocks of the disk are still with relays. */
  async isDiskPending(): Promise<boolean> {
    return (await this.#disk?.isPending()) ?? false;
  }

  /** Until none is. */
  async settleDisk(): Promise<void> {
    await this.#disk?.settle(this.#machine);
  }

  /** Nobody answers for the VM until its QEMU does. */
  get isSilent(): boolean {
    return this.#silent !== undefined;
  }

  /** The QEMU that was silent answers, or has ended (`null`). */
  answers(machine: Machine | null): void {
    this.#silent = undefined;
    this.#machine = machine;
    if (machine) this.#watchEnd(machine);
  }

  /** What an earlier daemon has written down of what relays hold. False if that of the disk is not known. */
  async findWritten(): Promise<boolean> {
    await this.#agents.findManifest();
    // First of all: its guest may wait for it.
    return (await this.#disk?.reopen()) ?? true;
  }

  /** Lets go of everything and leaves QEMU as it is. */
  async stop(): Promise<void> {
    this.#streams.endAll();
    await this.#disk?.end({ drop: false });
  }

  /** All of it is here, and what was for the way is put away. */
  async tidy(): Promise<void> {
    // A QEMU that has died has no settings.
    if (this.#machine) await stopListening(this.#machine.qmp).catch(() => {});
    await this.#around.merging?.removeManifest();
  }

  /** How far the merge is, once the source is not needed any more. */
  get mergeProgress(): MigrationProgress | undefined {
    const { mergeStatistics: merged } = this;
    const disk = this.#disk?.merge;
    if (!(this.#agents.manifest || disk) || !merged) return undefined;
    const sealedBytes = (this.#agents.manifest?.sealedBytes ?? 0) + (disk?.totalBytes ?? 0);
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
    const memory = this.#agents.mergeStatistics;
    const disk = this.#disk?.merge?.statistics;
    return memory && disk ? sumOfMerges(memory, disk) : (memory ?? disk);
  }

  /** The QEMU of the VM; it is the caller's from `settled` on. */
  get machine(): Machine | null {
    return this.#machine;
  }

  async make(): Promise<DestinationEvent> {
    const { storage, mode, engine } = this.#options.wanted;
    const channels = (engine ?? 'direct') === 'direct' ? this.#options.wanted.channels : 0;
    try {
      const disk = this.#disk;
      const machine = await this.#around.make(disk && (() => disk.listen()));
      this.#machine = machine;
      this.#watchEnd(machine);
      if (storage === 'copied' && !disk) await serveDisk(machine.qmp, this.#socket('disk'));
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
    this.#streams.open(() => this.#options.tell({ name: 'expired' }));
    return { name: 'made' };
  }

  /** The VM is to run, if it ran. */
  async resume(): Promise<DestinationEvent> {
    const machine = this.#machine;
    if (!machine) return { name: 'vm-ended' };
    const mayLackPages = this.#options.wanted.mode !== 'precopy';
    const patience: { timeoutMs?: number } = mayLackPages ? { timeoutMs: pageTimeoutMs } : {};
    try {
      // QEMU takes them in this order, also when it can do neither yet.
      await Promise.all([
        this.#closeDisk(machine, patience),
        this.#options.vm.running && machine.resume(patience),
      ]);
    } catch (error) {
      if (machine.qmp.state !== 'ready') return { name: 'vm-ended' };
      // It has the word and waits for a page that is still at the source: it runs when that comes.
      if (mayLackPages && asAppError(error).code === 'timeout')
        return { name: 'resumed', complete: false, divided: this.#agents.manifest !== undefined };
      const { running } = await machine.status().catch(() => ({ running: true }));
      if (!running) return { name: 'resume-refused', message: asAppError(error).message };
    }
    const { complete } = await this.look(patience.timeoutMs);
    const divided = this.#agents.manifest !== undefined;
    if (!complete || !(await this.#disk?.isPending())) return { name: 'resumed', complete, divided };
    // Nobody else watches for the rest of it.
    this.#options.tell({ name: 'completed' });
    return { name: 'resumed', complete: false, divided: true };
  }

  /** Only one that cannot go on: the last pages may have been on their way when the source gave it up. */
  async endVm(): Promise<DestinationEvent | undefined> {
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

  /** Its QEMU ends, and what is in its directory by now is of no use to anybody. */
  async discard(): Promise<void> {
    this.#streams.close();
    await this.#machine?.kill();
    this.#streams.endAll();
    await this.#disk?.end({ drop: true });
    for (const purpose of ['disk', 'memory'] as const)
      if (this.#machine) await rm(this.#socket(purpose), { force: true });
    this.#machine = null;
  }

  /** Once, and again only if that failed. */
  #closeDisk({ qmp }: Machine, options: { timeoutMs?: number } = {}): Promise<void> {
    if (this.#options.wanted.storage !== 'copied' || this.#disk) return Promise.resolve();
    this.#diskClosed ??= closeDisk(qmp, options).catch((error) => {
      this.#diskClosed = undefined;
      throw error;
    });
    return this.#diskClosed;
  }

  #watchEnd(machine: Machine): void {
    machine.exited.then(() => this.#options.tell({ name: 'vm-ended' }));
  }

  #watchLoading(machine: Machine): void {
    const { signal } = this.#options;
    const watch = async (): Promise<void> => {
      const { complete } = await waitUntilLoaded(machine.qmp, signal);
      this.#around.onStep?.('loaded');
      // The source has ended its mirror before it let the last of the memory go, so this need not wait for the commit.
      if (complete) this.#closeDisk(machine).catch(() => {});
      this.#options.tell({ name: 'loaded', complete });
      if (!complete) this.watchCompletion();
    };
    watch().catch((error) => {
      // A QEMU that has died tells its own end.
      if (machine.qmp.state === 'ready')
        this.#options.tell({ name: 'failed', message: asAppError(error).message });
    });
  }

  watchCompletion(): void {
    const { qmp } = this.#machine!;
    waitUntilComplete(qmp, {
      signal: this.#options.signal,
      whilePaused: () => this.#streams.offerRecovery(),
    }).then(
      () => this.#options.tell({ name: 'completed' }),
      () => {},
    );
  }

  /** How the VM is; QEMU that says nothing in time has nothing of it yet. */
  async look(timeoutMs?: number): Promise<{ found: Found; complete: boolean }> {
    if (this.#machine?.qmp.state !== 'ready') return { found: 'gone', complete: false };
    const options = { signal: this.#options.signal, ...(timeoutMs === undefined ? {} : { timeoutMs }) };
    try {
      const { loaded, complete, running } = await lookAt(this.#machine.qmp, options);
      return { found: !loaded ? 'waiting' : running ? 'running' : 'loaded', complete };
    } catch {
      return { found: 'waiting', complete: false };
    }
  }

  #socket(purpose: SessionPurpose): string {
    const { paths } = (this.#machine ?? this.#silent)!;
    return purpose === 'memory' ? paths.incoming : join(dirname(paths.qmp), 'disk.sock');
  }
}
