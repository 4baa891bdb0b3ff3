/**
 * The memory's way out of the source by way of an agent, condensed, and to relays where there are any: what the agent needs
 * of QEMU, of the disk and of relays, and what becomes of it when another one goes on with its work.
 */
import type { Duplex } from 'node:stream';
import { AppError, asAppError } from '../model/errors.ts';
import type { Uuid } from '../model/ids.ts';
import type { DivisionStatistics, EngineStatistics, MigrationOptions } from '../model/migration.ts';
import type { SetIndex, SetName } from '../pages/index.ts';
import type { RelayHolds } from '../relay/index.ts';
import type { Machine } from '../vm/machine.ts';
import { findDevicePages } from './condensed/device-pages.ts';
import { mirroredSet } from './condensed/disk-frames.ts';
import { GuestMemory, type GuestRam } from './condensed/guest-memory.ts';
import { SourceAgent } from './condensed/source-agent.ts';
import { noStatistics } from './condensed/statistics.ts';
import type { DiskDeparture } from './disk-departure.ts';
import type { MemoryAgent } from './memory-out.ts';
import { Divider } from './relayed/divider.ts';
import type { Pool } from './relayed/pool.ts';

export interface MemoryDepartureOptions {
  migrationId: Uuid;
  /** `null` if it has ended: then nothing leaves. */
  machine: Machine | null;
  /** The present ones: limits may change at any time. */
  wanted: () => MigrationOptions;
  /** Memory may refer to what the mirror has brought to the destination. */
  disk: DiskDeparture;
  openRelay: ((id: Uuid, group: string, holds: RelayHolds) => Promise<Duplex>) | undefined;
  pool: (() => Pool | undefined) | undefined;
  openIndex: (name: SetName) => Promise<SetIndex | undefined>;
  keepMemory: ((ram: GuestRam) => Promise<void>) | undefined;
  onStep: (step: string, facts?: Record<string, number>) => void;
}

export class MemoryDeparture {
  readonly #options: MemoryDepartureOptions;
  #agent: SourceAgent | undefined;
  #link: Duplex | undefined;
  #divider: Divider | undefined;
  /** From when the destination prepares until its memory session is there. */
  #opening: Promise<Divider | undefined> | undefined;

  constructor(options: MemoryDepartureOptions) {
    this.#options = options;
  }

  /** Relays need not wait for the destination. */
  openRelays(): void {
    this.#opening ??= this.#openDivider();
    // Whoever carries waits for it, if anybody does.
    this.#opening.catch(() => {});
  }

  /** Without `qemu` a post-copy goes on, out of the memory alone. Resolves when the destination has everything. */
  async carry(link: Duplex, qemu?: Duplex): Promise<void> {
    // At once: who asks for it again meanwhile must find it at work.
    this.#link = link;
    const { wanted, machine, disk, openIndex, onStep } = this.#options;
    const { process, qmp } = machine!;
    const statistics = this.#agent?.statistics ?? noStatistics();
    const { mode, relayed } = wanted();
    await using stack = new AsyncDisposableStack();
    const memory = await GuestMemory.open(process.pid, qmp).catch((error) => {
      statistics.fallback = asAppError(error).message;
      return undefined;
    });
    if (memory) stack.use(memory);
    // What an earlier one has placed is nobody's any more: its destination has said what it lacks.
    this.#divider?.end({ drop: true });
    this.#divider = await this.#takeDivider(memory !== undefined);
    this.#agent = new SourceAgent({
      link,
      qemu,
      memory,
      ...(memory && qemu && mode !== 'precopy' && { devicePages: findDevicePages(qmp, memory.mapped) }),
      mode: !qemu ? 'resume' : mode === 'precopy' ? 'precopy' : 'postcopy',
      // Relays take everything: no round goes to a destination that may be slow.
      drainAtOnce: mode === 'postcopy' || this.#divider !== undefined,
      dividesFirst: mode !== 'postcopy',
      dividesAll: relayed?.custodian !== undefined,
      openIndex: async (name) => (name === mirroredSet ? disk.whatIsMirrored() : openIndex(name)),
      keeps: memory !== undefined && this.#keepsMemory,
      divider: this.#divider,
      limitBps: () => wanted().limits.bandwidthBps,
      statistics,
      onStep,
    });
    await this.#agent.run();
  }

  /** The link of the last `carry` is still there. */
  get isServing(): boolean {
    return this.#link?.destroyed === false;
  }

  /** What steers QEMU asks the agent that there is by then. */
  get pace(): MemoryAgent {
    const { onStep } = this.#options;
    const agent = () => this.#agent;
    return {
      drain: () => {
        onStep('drain');
        agent()?.drain();
      },
      noteRound: (round, remainingBytes) => {
        agent()?.noteRound(round);
        const { changesPerSecond = 0 } = agent() ?? {};
        onStep('round', { round, remainingBytes, changesPerSecond: Math.round(changesPerSecond) });
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

  /** Whether the VM stands still for what is on its way. */
  hurry(isStopped: boolean): void {
    this.#agent?.hurry(isStopped);
  }

  get statistics(): EngineStatistics | undefined {
    return this.#agent?.statistics;
  }

  get division(): DivisionStatistics | undefined {
    return this.#divider?.statistics;
  }

  closeLink(): void {
    this.#link?.destroy();
  }

  /** `drop`: nobody will come for what relays have. */
  endDivision(how: { drop: boolean }): void {
    this.#opening?.then((divider) => divider?.end(how)).catch(() => {});
    this.#divider?.end(how);
  }

  /**
   * The VM has left: its memory is kept for its way back, where that is wanted. What cannot be kept costs bytes then, and
   * nothing now.
   */
  async keep(): Promise<void> {
    const { keepMemory, machine } = this.#options;
    if (!this.#keepsMemory || !keepMemory || !machine) return;
    try {
      await using memory = await GuestMemory.open(machine.process.pid, machine.qmp);
      await keepMemory(memory);
    } catch (error) {
      if (!(error instanceof AppError)) throw error;
    }
  }

  /** One that leaves by way of relays leaves for good: its host may be switched off. */
  get #keepsMemory(): boolean {
    const { keepMemory, wanted } = this.#options;
    return wanted().engine === 'condensed' && keepMemory !== undefined;
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
    const { migrationId, wanted, openRelay, pool } = this.#options;
    const { engine, relayed } = wanted();
    if (engine !== 'relayed' || !relayed || !openRelay) return undefined;
    const relays = relayed.relays.map(({ id, name }) => ({
      id,
      name,
      open: (group: string) => openRelay(id, group, 'memory'),
    }));
    const divider = new Divider({
      migrationId,
      relays,
      replicas: relayed.replicas,
      // What a custodian is given stands on itself.
      pool: relayed.custodian ? undefined : pool?.(),
    });
    await divider.open();
    return divider;
  }
}
