/**
 * The disk's way out of the source, where it is not shared: QEMU mirrors it through a door of ours, and what comes through
 * goes to the destination's QEMU as it is, to an agent there (condensed), or to relays.
 */
import { once } from 'node:events';
import type { Socket } from 'node:net';
import type { Duplex } from 'node:stream';
import { asAppError } from '../model/errors.ts';
import type { Uuid } from '../model/ids.ts';
import type { DivisionStatistics, EngineStatistics, MigrationOptions } from '../model/migration.ts';
import { digestBytes, MemoryIndex, noBlock, type SetIndex, type SetName } from '../pages/index.ts';
import type { QmpConnection } from '../qmp/index.ts';
import type { RelayHolds } from '../relay/index.ts';
import type { Machine } from '../vm/machine.ts';
import { DiskSource } from './condensed/disk-source.ts';
import { noStatistics } from './condensed/statistics.ts';
import { joinStreams } from './doors.ts';
import { unlimitedBytesPerSecond } from './memory-out.ts';
import { dropMirror, finishMirror, setMirrorSpeed, startMirror, waitUntilMirrored } from './mirror.ts';
import type { MirrorProgress } from './mirror-policy.ts';
import { endReadBack, ReadBack } from './read-back.ts';
import { DiskDivider } from './relayed/disk-divider.ts';
import { Divider } from './relayed/divider.ts';

/** 2 GiB of mirrored content that memory and later writes can refer to; takes about 50 MB when full. */
const mostMirroredBlocks = 2 ** 19;

export interface DiskDepartureOptions {
  migrationId: Uuid;
  /** `null` if it has ended: then nothing leaves. */
  machine: Machine | null;
  /** Also that a block is zero goes: there is an image below it only at the destination. */
  wholeDisk: boolean;
  /** The present ones: limits may change at any time. */
  wanted: () => MigrationOptions;
  /** What QEMU is to keep to. */
  bandwidthBps: () => number | undefined;
  openRelay: ((id: Uuid, group: string, holds: RelayHolds) => Promise<Duplex>) | undefined;
  openIndex: (name: SetName) => Promise<SetIndex | undefined>;
}

export class DiskDeparture {
  readonly #options: DiskDepartureOptions;
  #session: Duplex | undefined;
  #agent: DiskSource | undefined;
  #mirrored: MemoryIndex | undefined;
  /** QEMU has ended the mirror. */
  #isMirrored = false;
  #divider: DiskDivider | undefined;
  #readBack: ReadBack | undefined;

  constructor(options: DiskDepartureOptions) {
    this.#options = options;
  }

  /**
   * Resolves when the mirror has caught up. `open`: a door for QEMU, which ends with all others by `close`, and is opened
   * anew if the link was cut while QEMU and the server of the disk greeted each other.
   */
  async mirror(doing: {
    open: () => Promise<string>;
    close: () => Promise<void>;
    onProgress: (progress: MirrorProgress) => void;
    signal: AbortSignal;
  }): Promise<void> {
    const { signal, onProgress } = doing;
    const qmp = this.#qmp;
    while (!(await this.#start(await doing.open(), signal))) {
      await doing.close();
      await dropMirror(qmp, signal);
    }
    // It may have been changed while there was no job to tell.
    await this.keepToSpeed();
    await waitUntilMirrored(qmp, { signal, onProgress }).catch((error) => {
      // QEMU only says that its mirror failed.
      throw this.#divider?.failure ?? error;
    });
  }

  /** False if the link was cut while QEMU and the server of the disk greeted each other: QEMU is to be let go, to try again. */
  async #start(socketPath: string, signal: AbortSignal): Promise<boolean> {
    const { wholeDisk } = this.#options;
    const speedBytesPerSecond = this.#speedBytesPerSecond;
    try {
      await startMirror(this.#qmp, { socketPath, signal, speedBytesPerSecond, wholeDisk });
      return true;
    } catch (error) {
      if (signal.aborted || asAppError(error).code !== 'timeout') throw error;
      return false;
    }
  }

  /** The present limit holds for the mirror, if there is one. */
  async keepToSpeed(): Promise<void> {
    await setMirrorSpeed(this.#qmp, this.#speedBytesPerSecond);
  }

  get #speedBytesPerSecond(): number {
    const bandwidthBps = this.#options.bandwidthBps();
    return bandwidthBps === undefined ? unlimitedBytesPerSecond : Math.max(1, Math.floor(bandwidthBps / 8));
  }

  get #qmp(): QmpConnection {
    return this.#options.machine!.qmp;
  }

  /**
   * Resolves with the first words of the destination: QEMU answers nothing while it waits for those of an NBD server, and
   * its guest stands still, which must not last as long as a cut of the link.
   */
  async take(session: Duplex, signal: AbortSignal): Promise<void> {
    this.#session = session;
    // Until QEMU is joined with it; then it meets what went wrong.
    session.on('error', () => {});
    await once(session, 'readable', { signal });
  }

  /** QEMU's mirror, into the session that was taken. Resolves when QEMU has taken its leave. */
  async carry(session: Duplex, qemu: Socket): Promise<void> {
    const { engine = 'direct', relayed } = this.#options.wanted();
    if (relayed?.diskRelays) return this.#divide(session, qemu);
    if (engine !== 'direct') return this.#condense(session, qemu);
    passOn(session, qemu);
    await joinStreams(session, qemu);
  }

  /** The VM stands still: the mirror ends, if there is one, and relays get the rest. */
  async end(signal: AbortSignal): Promise<void> {
    if (this.#options.wanted().storage === 'copied') await finishMirror(this.#qmp, signal);
    await this.#divider?.end(signal);
    this.#isMirrored = true;
  }

  /** As far as it went to relays from here: until enough of them hold all of it, this side is needed. */
  get isSafe(): boolean {
    return this.#divider?.isSafe ?? true;
  }

  get statistics(): EngineStatistics | undefined {
    return (this.#divider ?? this.#agent)?.statistics;
  }

  get division(): DivisionStatistics | undefined {
    return this.#divider?.division;
  }

  /**
   * What memory may refer to on the destination's disk: as long as the mirror goes on. In post-copy the destination has
   * closed it to us, and each reference would cost a round trip.
   */
  whatIsMirrored(): SetIndex | undefined {
    const mirrored = this.#mirrored;
    if (!mirrored) return undefined;
    return {
      entries: mirrored.entries,
      lookup: async (digests) => {
        if (this.#isMirrored && this.#options.wanted().mode !== 'precopy')
          return new Uint32Array(digests.length / digestBytes).fill(noBlock);
        const found = await mirrored.lookup(digests);
        return found.map((block) => (this.#agent?.isPending(block) ? noBlock : block));
      },
      async [Symbol.asyncDispose]() {},
    };
  }

  /** Its session ends; `keepsDivision`: not one over which the destination is told of slabs. */
  closeSession({ keepsDivision }: { keepsDivision: boolean }): void {
    if (!keepsDivision || !this.#divider) this.#session?.destroy();
  }

  /** `drop`: nobody will come for what relays have. */
  close(how: { drop: boolean }): void {
    this.#divider?.close(how);
    this.#readBack?.close();
  }

  /** QEMU's server, from which blocks were read again. */
  async endReadBack(): Promise<void> {
    if (this.#options.wanted().relayed?.diskRelays) await endReadBack(this.#qmp);
  }

  async #condense(link: Duplex, qemu: Socket): Promise<void> {
    const { wanted, openIndex } = this.#options;
    this.#mirrored = new MemoryIndex({ maxEntries: mostMirroredBlocks });
    this.#agent = new DiskSource({
      qemu,
      link,
      openIndex,
      mirrored: this.#mirrored,
      limitBps: () => wanted().limits.bandwidthBps,
      statistics: noStatistics(),
    });
    await this.#agent.run();
  }

  async #divide(link: Duplex, qemu: Socket): Promise<void> {
    const { migrationId, wanted, openRelay, machine } = this.#options;
    const { diskRelays, replicas } = wanted().relayed!;
    const relays = diskRelays!.map(({ id, name }) => ({
      id,
      name,
      open: (group: string) => openRelay!(id, group, 'disk'),
    }));
    // What an earlier one has placed is nobody's any more.
    this.#divider?.close({ drop: true });
    const divider = new Divider({ migrationId, relays, replicas });
    await divider.open();
    this.#readBack ??= new ReadBack(this.#qmp, machine!.paths.qmp);
    const readBack = this.#readBack;
    this.#divider = new DiskDivider({
      qemu,
      link,
      divider,
      readBack: (offset, lengthBytes) => readBack.read(offset, lengthBytes),
      isPaused: () => wanted().limits.paused === true,
    });
    await this.#divider.run();
  }
}

/** What was awaited of the stream before it is joined with the socket. */
function passOn(stream: Duplex, socket: Socket): void {
  for (let bytes = stream.read(); bytes !== null; bytes = stream.read()) socket.write(bytes);
}
