/**
 * The agents at the destination, between the link and QEMU, with what they need of it, of the reference sets that are here
 * and of relays. They know of each other: memory refers to what the disk's has brought.
 *
 * Relayed: the *manifest* says where all of the memory is that is missing. From then on the source is not needed.
 */
import { createConnection } from 'node:net';
import type { Duplex } from 'node:stream';
import { asAppError } from '../model/errors.ts';
import type { Uuid } from '../model/ids.ts';
import type { MergeStatistics } from '../model/migration.ts';
import { connectNbd, type NbdClient } from '../nbd/index.ts';
import type { BlockReader, SetName } from '../pages/index.ts';
import type { RelayHolds } from '../relay/index.ts';
import type { Machine } from '../vm/machine.ts';
import { DestinationAgent } from './condensed/destination-agent.ts';
import { diskReader, takeDisk } from './condensed/disk-destination.ts';
import { mirroredSet } from './condensed/disk-frames.ts';
import { GuestMemory } from './condensed/guest-memory.ts';
import { exportName } from './mirror.ts';
import type { Custody } from './relayed/custody.ts';
import { Manifest } from './relayed/manifest.ts';
import type { Merging } from './relayed/memory-merging.ts';

export interface AgentsInSurroundings {
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
  merging?: MergingSurroundings;
  /** What goes on within a state, for those who look where time goes. */
  onStep?: (step: string) => void;
}

export interface MergingSurroundings {
  /** A session of a group of slabs with a relay. */
  openRelay: (id: Uuid, group: string, holds: RelayHolds) => Promise<Duplex>;
  /** A file of the VM's that nobody else reads: where all of it is that is missing, with the key. */
  readManifest: () => Promise<Buffer | undefined>;
  /** Resolves when it is on the disk. */
  writeManifest: (bytes: Buffer) => Promise<void>;
  removeManifest: () => Promise<void>;
  tellOperator: (message: string) => void;
}

export interface AgentsInOptions {
  surroundings: AgentsInSurroundings;
  isRelayed: boolean;
  /** Where there is a custodian. */
  custody: Custody | undefined;
  /** It runs here, with somebody who may have to go on with it. */
  isOurs: () => boolean;
  /** All that is missing is known to be with relays, and written down. */
  onDivided: () => void;
}

/** For QEMU to say where its memory lies; without it an agent goes on with less. */
const pausedAnswerTimeoutMs = 500;

export class AgentsIn {
  readonly #options: AgentsInOptions;
  readonly #around: AgentsInSurroundings;
  #agent: DestinationAgent | undefined;
  /** Our connection to the disk that QEMU serves. */
  #disk: NbdClient | undefined;
  #manifest: Manifest | undefined;

  constructor(options: AgentsInOptions) {
    this.#options = options;
    this.#around = options.surroundings;
  }

  get manifest(): Manifest | undefined {
    return this.#manifest;
  }

  get mergeStatistics(): MergeStatistics | undefined {
    return this.#agent?.mergeStatistics;
  }

  /** What an earlier daemon has written down. One that cannot be read is as good as none: the source is asked. */
  async findManifest(): Promise<void> {
    const { merging } = this.#around;
    const bytes = await merging?.readManifest();
    if (!bytes) return;
    try {
      this.#manifest = Manifest.fromBytes(bytes);
    } catch (error) {
      merging!.tellOperator(`The manifest of the VM's memory is lost: ${asAppError(error).message}`);
    }
  }

  /**
   * The memory, into the QEMU that listens at `path`; without a link it comes by the manifest alone. `isFirst`: it has
   * nothing of it yet. `machine`: `null` for one that answers nothing.
   */
  async takeMemory(from: {
    path: string;
    link: Duplex | undefined;
    machine: Machine | null;
    isFirst: boolean;
    onQemu: (qemu: Duplex) => void;
  }): Promise<void> {
    const { path, link, machine, isFirst, onQemu } = from;
    const { sets, openReader, missing, remember, onStep } = this.#around;
    // One that lost its post-copy may wait for a page itself: who is to bring the page does not wait for its answer.
    const answer = isFirst ? { mayWrite: missing !== undefined } : { timeoutMs: pausedAnswerTimeoutMs };
    const qemu = createConnection({ path, allowHalfOpen: true });
    onQemu(qemu);
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
        remember,
        merging: this.#merging,
        ...(onStep ? { onStep } : {}),
      });
      this.#agent = agent;
      await agent.run();
    } catch (error) {
      qemu.destroy();
      link?.destroy();
      throw error;
    }
  }

  /**
   * The mirrored disk, into the one that QEMU serves at `path`. The connection to it stays for memory, which refers to the
   * disk, until QEMU ends its server.
   */
  async takeDisk(path: string, link: Duplex): Promise<void> {
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

  get #merging(): Merging | undefined {
    const { isRelayed, custody, isOurs, onDivided } = this.#options;
    const { merging } = this.#around;
    if (!isRelayed || !merging) return undefined;
    return {
      manifest: this.#manifest,
      openRelay: (id, group) => merging.openRelay(id, group, 'memory'),
      wantsWhole: custody !== undefined,
      keep: async (manifest, whole) => {
        if (custody && whole && !(await custody.deposit(manifest, whole, isOurs))) return;
        await merging.writeManifest(manifest.toBytes());
        this.#manifest = manifest;
      },
      onDivided,
      onLost: merging.tellOperator,
    };
  }
}
