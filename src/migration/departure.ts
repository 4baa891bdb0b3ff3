/**
 * What the source does with QEMU for a migration: copies disk and memory out of it, lets them go, puts everything back as it
 * was, serves what is missing at the destination, and leaves. Whether and when, `source.ts` says.
 */
import { rm } from 'node:fs/promises';
import type { Socket } from 'node:net';
import { dirname, join } from 'node:path';
import type { Duplex } from 'node:stream';
import { asAppError } from '../model/errors.ts';
import type { Uuid } from '../model/ids.ts';
import type { MigrationLimits, MigrationOptions, VmToMove } from '../model/migration.ts';
import type { SetIndex, SetName } from '../pages/index.ts';
import type { MigrationStatus, QmpConnection } from '../qmp/index.ts';
import type { RelayHolds } from '../relay/index.ts';
import type { Machine } from '../vm/machine.ts';
import type { GuestRam } from './condensed/guest-memory.ts';
import { DiskDeparture } from './disk-departure.ts';
import { diskMarkOf, markDisk, unmarkDisk } from './disk-mark.ts';
import { type Door, joinStreams, openDoor } from './doors.ts';
import { MemoryDeparture } from './memory-departure.ts';
import {
  dropMemoryOut,
  isBoundToPostcopy,
  letGo,
  resumePostcopy,
  sendMemory,
  setLimits,
} from './memory-out.ts';
import { dropMirror } from './mirror.ts';
import type { ProgressTracker } from './progress.ts';
import type { SessionPurpose, Ticket } from './protocol.ts';
import type { Pool } from './relayed/pool.ts';
import { sumOfDivisions } from './relayed/statistics.ts';

export interface DepartureSurroundings {
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
  /** What goes on within a state, for those who look where time goes. */
  onStep?: (step: string, facts?: Record<string, number>) => void;
  tellOperator: (message: string) => void;
}

export interface DepartureOptions {
  id: Uuid;
  vm: VmToMove;
  /** `null` if it has ended. */
  machine: Machine | null;
  /** The present ones: limits may change at any time. */
  wanted: () => MigrationOptions;
  surroundings: DepartureSurroundings;
  tracker: ProgressTracker;
  /** The tracker knows more. */
  onProgress: () => void;
}

const undoTimeoutMs = 30_000;

export class Departure {
  readonly #options: DepartureOptions;
  readonly #around: DepartureSurroundings;
  readonly #tracker: ProgressTracker;
  readonly #disk: DiskDeparture;
  readonly #memory: MemoryDeparture;
  readonly #doors: Door[] = [];
  #copy: { abort: AbortController; done: Promise<void> } | undefined;
  #isRecovering = false;
  /** Of the ticket by which post-copy went on last. */
  #recoverySecret: string | undefined;
  /** Since this daemon let QEMU go past the pause of a post-copy. */
  #wasLetGo = false;

  constructor(options: DepartureOptions) {
    this.#options = options;
    this.#around = options.surroundings;
    this.#tracker = options.tracker;
    const { id, machine, vm, surroundings } = options;
    const parts = {
      migrationId: id,
      machine,
      wanted: options.wanted,
      openRelay: surroundings.openRelay,
      openIndex: async (name: SetName) => surroundings.openIndex?.(name),
    };
    this.#disk = new DiskDeparture({
      ...parts,
      wholeDisk: vm.wholeDisk === true,
      bandwidthBps: () => this.#limitsOfQemu().bandwidthBps,
    });
    this.#memory = new MemoryDeparture({
      ...parts,
      disk: this.#disk,
      pool: surroundings.pool,
      keepMemory: surroundings.keepMemory,
      onStep: (step, facts) => this.#step(step, facts),
    });
  }

  /** While the destination prepares: relays are opened, where no disk goes before the memory. */
  prepare(): void {
    if (this.#options.wanted().storage !== 'copied') this.#memory.openRelays();
  }

  /** Copies until the VM stands still and may be released; `undo` and `stop` end it by the signal. */
  begin(ticket: Ticket): { copied: Promise<void>; signal: AbortSignal } {
    const abort = new AbortController();
    const copied = this.#copyAll(ticket, abort.signal);
    this.#copy = { abort, done: copied.catch(() => {}) };
    return { copied, signal: abort.signal };
  }

  /** Limits that have changed hold for a copy that is under way. */
  async keepToLimits(): Promise<void> {
    const { machine } = this.#options;
    if (!machine || !this.#copy) return;
    await setLimits(machine.qmp, this.#limitsOfQemu());
    await this.#disk.keepToSpeed();
  }

  /** Whether the VM stands still for what is on its way. */
  hurry(isStopped: boolean): void {
    this.#memory.hurry(isStopped);
  }

  /** As far as the disk went to relays: until enough of them hold all of it, this side is needed. */
  get isDiskSafe(): boolean {
    return this.#disk.isSafe;
  }

  async #copyAll(ticket: Ticket, signal: AbortSignal): Promise<void> {
    const { qmp } = this.#options.machine!;
    const { mode, storage, channels, engine } = this.#options.wanted();
    const isCondensed = this.#isCondensed;
    if (storage === 'copied') {
      this.#tracker.enter('disk');
      await this.#disk.mirror({
        open: () => this.#openDiskDoor(ticket, signal),
        close: () => this.#closeDoors(),
        onProgress: (progress) => {
          this.#tracker.disk(progress);
          this.#tellCondensed();
          this.#options.onProgress();
        },
        signal,
      });
    }
    this.#tracker.enter('memory');
    await sendMemory(qmp, {
      socketPath: await this.#openMemoryDoor(ticket, signal),
      // Relays take what there is from the first round on, and then it is time.
      mode: engine === 'relayed' ? 'postcopy' : mode,
      limits: () => this.#limitsOfQemu(),
      channels: isCondensed ? 0 : channels,
      signal,
      ...(isCondensed && { agent: this.#memory.pace }),
      onInfo: (info) => {
        this.#tracker.memory(info);
        this.#tellCondensed();
        this.#options.onProgress();
      },
      whenPaused: async () => {
        this.#step('pre-switchover');
        this.#tracker.enter('switchover');
        await this.#disk.end(signal);
        if (this.#diskMark) await markDisk(qmp, this.#diskMark);
      },
    });
  }

  async #openDiskDoor(ticket: Ticket, signal: AbortSignal): Promise<string> {
    const session = await this.#around.openSession('disk', ticket, signal);
    await this.#disk.take(session, signal);
    return this.#openDoor('disk', (socket) => {
      this.#step('disk session');
      return this.#disk.carry(session, socket);
    });
  }

  #openMemoryDoor(ticket: Ticket, signal: AbortSignal): Promise<string> {
    return this.#openDoor('memory', async (socket) => {
      const session = await this.#around.openSession('memory', ticket, signal);
      this.#step('memory session');
      if (this.#isCondensed) await this.#condense(session, socket);
      else await joinStreams(session, socket);
    });
  }

  async #openDoor(purpose: SessionPurpose, serve: (socket: Socket) => Promise<void>): Promise<string> {
    const path = this.#socket(purpose);
    this.#doors.push(await openDoor(path, serve));
    return path;
  }

  /** Every trace of the copy goes from QEMU, and the VM runs if it ran. */
  async undo(): Promise<void> {
    this.#copy?.abort.abort();
    // A QEMU that waits for the disk's server answers when that is gone. With memory on its way, closed doors would make
    // it fail before it is told to end.
    if (!this.#memoryDoor) await this.#closeDoors();
    await this.#copy?.done;
    this.#copy = undefined;
    const { machine } = this.#options;
    if (machine && machine.qmp.state === 'ready') {
      const signal = AbortSignal.timeout(undoTimeoutMs);
      await this.#orReport('QEMU did not end the copy of the memory', () =>
        dropMemoryOut(machine.qmp, signal),
      );
      // First of all the VM: what else is to be undone does not hold it up.
      if (this.#options.vm.running)
        await this.#orReport('The VM does not run again; try viper vm resume', () => machine.resume());
      await this.#orReport('QEMU did not end the copy of the disk', () => dropMirror(machine.qmp, signal));
      const mark = this.#diskMark;
      if (mark) await this.#orReport('A snapshot is left in the disk', () => unmarkDisk(machine.qmp, mark));
    }
    await this.#closeDoors();
    // Nobody will come for what it has given away.
    this.#endDividers({ drop: true });
    if (machine?.qmp.state === 'ready')
      await this.#orReport('QEMU did not end its server of the disk', () => this.#disk.endReadBack());
    // Those of an earlier daemon, of which only the names are left.
    if (machine)
      for (const purpose of ['disk', 'memory'] as const) await rm(this.#socket(purpose), { force: true });
  }

  /** For whoever may have to go on with the VM as it is when it leaves. */
  get #diskMark(): string | undefined {
    return this.#options.wanted().relayed?.custodian && diskMarkOf(this.#options.id);
  }

  get #memoryDoor(): Door | undefined {
    return this.#doors.find(({ path }) => path === this.#socket('memory'));
  }

  /** A stream that has ended takes no last state: its destination rejects, and finds QEMU free to be taken back. */
  async letGo(): Promise<void> {
    if (!this.#memoryDoor || this.#memoryDoor.isBroken) return;
    this.#wasLetGo = true;
    const { qmp } = this.#options.machine!;
    await this.#orReport('QEMU did not go on with the post-copy', () => letGo(qmp));
  }

  /** As `undo`, after the VM was let go; a QEMU that has no way back ends. */
  async takeBack(): Promise<void> {
    const { machine } = this.#options;
    await this.#closeDoors();
    if (machine?.qmp.state === 'ready' && (await this.#isBound(machine.qmp))) {
      await machine.kill();
      this.#around.tellOperator(
        'The destination could not load the VM in post-copy, and QEMU cannot take a post-copy back: ' +
          'the VM has crashed at the source and can be started from its disk',
      );
      return;
    }
    await this.undo();
  }

  /** One that does not answer at all is no more than that; `undo` reports it. */
  #isBound(qmp: QmpConnection): Promise<boolean> {
    const signal = AbortSignal.timeout(undoTimeoutMs);
    return isBoundToPostcopy(qmp, { wasLetGo: this.#wasLetGo, signal }).catch(() => false);
  }

  /**
   * The destination asks for a new session when it misses the old one, so here is only to look. A QEMU that loses its
   * stream between its last page and the destination's thanks does not wait for another but fails (its `migration_completion`).
   */
  async look(): Promise<'serving' | 'failed' | 'gone'> {
    const { machine } = this.#options;
    if (machine?.qmp.state !== 'ready') return 'gone';
    let status: MigrationStatus | undefined;
    await this.#orReport('QEMU does not say how far the pages are', async () => {
      const info = await machine.qmp.execute('query-migrate');
      status = info.status;
      this.#tracker.memory(info);
    });
    this.#options.onProgress();
    return status === 'failed' ? 'failed' : 'serving';
  }

  /**
   * Post-copy goes on over a new session; the destination repeats its wish until it does. `isRunningThere`: not only on its
   * way.
   */
  async recover(ticket: Ticket, { isRunningThere }: { isRunningThere: boolean }): Promise<void> {
    const { machine } = this.#options;
    if (!machine || this.#isRecovering) return;
    if (!isRunningThere && !(await this.#mayServePages(machine))) return;
    // The wish may have been repeated before its session arrived, which another one would break.
    const isServing = this.#isCondensed
      ? this.#memory.isServing
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
        this.#condense(link).catch(() => {
          // The destination notices, and asks again.
          link.destroy();
        });
        return;
      }
      const socketPath = await this.#openDoor('memory', async (socket) =>
        joinStreams(await this.#around.openSession('memory', ticket, signal), socket),
      );
      await resumePostcopy(machine.qmp, { socketPath, signal });
    } finally {
      this.#isRecovering = false;
    }
  }

  /** Also before the word that the VM runs there: what it waits for on its way there may be a page. */
  async #mayServePages({ qmp }: Machine): Promise<boolean> {
    if (this.#options.wanted().mode === 'precopy') return false;
    if (this.#isCondensed) return true;
    // One that has not begun post-copy would lose its stream, and with it the way back.
    const { status } = await qmp.execute('query-migrate');
    return status?.startsWith('postcopy-') ?? false;
  }

  /** The VM is gone, and its QEMU with it. */
  async leave(): Promise<void> {
    this.#tellCondensed();
    if (this.#options.machine) {
      const { qmp } = this.#options.machine;
      await qmp.execute('query-migrate').then(
        (info) => this.#tracker.memory(info),
        () => {},
      );
      await this.#memory.keep();
      await this.#options.machine.kill();
    }
    await this.#copy?.done;
    await this.#closeDoors();
    this.#endDividers({ drop: false });
  }

  /** Lets go of everything and leaves QEMU as it is. No more is asked of it when `asked` has resolved. */
  async stop(asked: Promise<void>): Promise<void> {
    this.#copy?.abort.abort();
    await this.#closeDoors();
    await this.#copy?.done;
    await asked;
    await this.#closeDoors();
    this.#endDividers({ drop: false });
  }

  get #isCondensed(): boolean {
    return (this.#options.wanted().engine ?? 'direct') !== 'direct';
  }

  /** What QEMU writes is not what the link carries, so the rate is held at the link. */
  #limitsOfQemu(): MigrationLimits {
    const { bandwidthBps, ...others } = this.#options.wanted().limits;
    return this.#isCondensed || bandwidthBps === undefined ? others : this.#options.wanted().limits;
  }

  #step(step: string, facts?: Record<string, number>): void {
    this.#around.onStep?.(step, facts);
  }

  #tellCondensed(): void {
    const [memory, disk] = [this.#memory.statistics, this.#disk.statistics];
    this.#tracker.condensed({ ...(memory && { memory }), ...(disk && { disk }) });
    const [divided, ofDisk] = [this.#memory.division, this.#disk.division];
    if (divided) this.#tracker.relayed(ofDisk ? sumOfDivisions(divided, ofDisk) : divided);
  }

  /** Without `qemu` a post-copy goes on, out of the memory alone. Resolves when the destination has everything. */
  async #condense(link: Duplex, qemu?: Duplex): Promise<void> {
    try {
      await this.#memory.carry(link, qemu);
    } finally {
      this.#tellCondensed();
    }
  }

  #endDividers(how: { drop: boolean }): void {
    this.#memory.endDivision(how);
    this.#disk.close(how);
  }

  async #closeDoors({ keepsDisk = false } = {}): Promise<void> {
    for (const door of this.#doors.splice(0)) await door[Symbol.asyncDispose]();
    this.#memory.closeLink();
    this.#disk.closeSession({ keepsDivision: keepsDisk });
  }

  #socket(purpose: SessionPurpose): string {
    return join(dirname(this.#options.machine!.paths.qmp), `to-${purpose}.sock`);
  }

  /** A step that fails must not keep the next ones from being done, and a human may have to look at it. */
  async #orReport(whatFails: string, step: () => Promise<unknown>): Promise<void> {
    try {
      await step();
    } catch (error) {
      if (this.#options.machine?.qmp.state === 'ready')
        this.#around.tellOperator(`${whatFails}: ${asAppError(error).message}`);
    }
  }
}
