/**
 * The streams that the source brings for one migration, and what they are joined with at the destination: the first ones by
 * the ticket of `prepare`, and in post-copy others in the place of one that was lost, with a ticket of its own each.
 */
import { rm } from 'node:fs/promises';
import type { Duplex } from 'node:stream';
import { AppError } from '../model/errors.ts';
import type { MigrationOptions } from '../model/migration.ts';
import type { Machine } from '../vm/machine.ts';
import type { MachinePaths } from '../vm/paths.ts';
import type { AgentsIn } from './agents-in.ts';
import type { DiskArrival } from './disk-arrival.ts';
import { joinWithQemu } from './doors.ts';
import { listenForRecovery } from './memory-in.ts';
import type { SessionPurpose, Ticket } from './protocol.ts';
import { TicketDesk } from './ticket-desk.ts';

/** The QEMU that is there and does not answer. */
export interface SilentQemu {
  paths: MachinePaths;
  /** Past its main loop; see `SpareMonitor`. */
  recover: (socketPath: string) => Promise<void>;
}

export interface StreamsInOptions {
  wanted: MigrationOptions;
  agents: AgentsIn;
  /** One that comes by way of relays. */
  disk: DiskArrival | undefined;
  /** The one that there is by now; `silent` while it does not answer. */
  qemu: () => { machine: Machine | null; silent: SilentQemu | undefined };
  /** On which QEMU listens. */
  socketPath: (purpose: SessionPurpose) => string;
  /** How long the source may take to come with the ticket. */
  ticketMs: number;
  /** QEMU waits for its first stream. */
  isWaiting: () => boolean;
  /** The source is to come with this ticket, and the pages that are missing. */
  askForPages: (ticket: Ticket) => void;
  onStep: ((step: string) => void) | undefined;
}

/** One; and a source whose link was cut while its QEMU greeted ours comes again. */
const mostDiskSessions = 5;

/**
 * For QEMU to take a stream that was joined with it; it calls itself paused until it has. Each next one has twice as
 * long, so that on a busy machine one recovery does not end the other.
 */
const firstTakeTimeoutMs = 2000;
const mostTakeTimeoutMs = 8000;

export class StreamsIn {
  readonly #options: StreamsInOptions;
  readonly #desk: TicketDesk;
  readonly #streams = new Set<Duplex>();
  /** Post-copy waits for a source that comes back: QEMU listens, and the source is asked. */
  #isPaused = false;
  #acceptedAt = Number.NEGATIVE_INFINITY;
  #takeTimeoutMs = firstTakeTimeoutMs;
  #isMergingAlone = false;
  #isOffering = false;

  constructor(options: StreamsInOptions) {
    this.#options = options;
    this.#desk = new TicketDesk(options.ticketMs);
  }

  /** From now on the source is awaited, who has to come in time. */
  open(onExpired: () => void): void {
    this.#desk.open(onExpired);
  }

  /** Of a source that is awaited. */
  get ticket(): Ticket | undefined {
    return this.#desk.ticket;
  }

  /** It is not awaited any more; streams that are there go on. */
  close(): void {
    this.#desk.close();
  }

  /**
   * Takes a session of the source. `forbidden` for a wrong, used or expired ticket: one disk session and as many
   * for memory as were agreed on.
   */
  accept(purpose: SessionPurpose, secret: string, stream: Duplex): void {
    const { wanted, disk, agents, socketPath, onStep } = this.#options;
    const { storage, channels, engine } = wanted;
    const isDirect = (engine ?? 'direct') === 'direct';
    const memorySessions = isDirect ? 1 + channels : 1;
    const diskSessions = storage === 'copied' ? mostDiskSessions : 0;
    const most = purpose === 'disk' ? diskSessions : memorySessions;
    const isAwaited = this.#options.isWaiting() || this.#isPaused;
    if (!isAwaited || !this.#desk.isGood(purpose, secret, most)) {
      throw new AppError('forbidden', `The ticket is not good for a ${purpose} session`, {
        wanted: 'ticket',
      });
    }
    onStep?.(`${purpose} session`);
    this.#desk.note(purpose);
    this.#isPaused = false;
    this.#acceptedAt = performance.now();
    this.#streams.add(stream);
    // Whoever uses it hears of it; and when nobody does any more, it may break as it will.
    stream.on('error', () => {});
    stream.once('close', () => this.#streams.delete(stream));
    const path = socketPath(purpose);
    const joined =
      purpose === 'disk' && disk
        ? disk.take(stream)
        : isDirect
          ? joinWithQemu(path, stream)
          : purpose === 'memory'
            ? this.#takeMemory(path, stream)
            : agents.takeDisk(path, stream);
    joined.catch(() => {
      // QEMU notices by itself, and what becomes of it is watched.
    });
  }

  #takeMemory(path: string, link: Duplex | undefined): Promise<void> {
    return this.#options.agents.takeMemory({
      path,
      link,
      machine: this.#options.qemu().machine,
      isFirst: this.#options.isWaiting(),
      // Who merges has no link that could be broken when all of it is to end.
      onQemu: (qemu) => {
        this.#streams.add(qemu);
        qemu.once('close', () => this.#streams.delete(qemu));
      },
    });
  }

  /** Whatever is awaited and has not come is asked for. */
  retry(): void {
    if (this.#options.qemu().silent) void this.offerRecovery();
    if (this.#isPaused) this.#askForPages();
  }

  /**
   * The stream of pages was lost: a new one may come, with a ticket of its own. If that one is lost as well, or QEMU
   * did not take it, so may another.
   */
  async offerRecovery(): Promise<void> {
    const isTaking = this.#streams.size > 0 && performance.now() - this.#acceptedAt < this.#takeTimeoutMs;
    if (isTaking || this.#isPaused || this.#isMergingAlone || this.#isOffering) return;
    this.#isOffering = true;
    const { agents, disk, qemu } = this.#options;
    const { silent } = qemu();
    const socketPath = this.#options.socketPath('memory');
    try {
      if (silent) {
        await agents.findManifest();
        await disk?.reopen();
      }
      await rm(socketPath, { force: true });
      await (silent ? silent.recover(socketPath) : listenForRecovery(qemu().machine!.qmp, socketPath));
      // Only now: one that says nothing has not said that its stream is lost, and refuses another one if it is not.
      if (this.#streams.size > 0) this.#takeTimeoutMs = Math.min(mostTakeTimeoutMs, this.#takeTimeoutMs * 2);
      this.endAll();
    } catch {
      // It is not yet done with the stream before; it is asked again as long as it says that it is paused.
      return;
    } finally {
      this.#isOffering = false;
    }
    if (agents.manifest) {
      this.#mergeAlone(socketPath);
      return;
    }
    this.#desk.reopenMemory();
    this.#isPaused = true;
    this.#askForPages();
  }

  /** Without the source: an agent that knows the manifest. When it is lost, QEMU pauses again, and so does this. */
  #mergeAlone(socketPath: string): void {
    this.#isMergingAlone = true;
    this.#acceptedAt = performance.now();
    this.#takeMemory(socketPath, undefined)
      .catch(() => {})
      .finally(() => {
        this.#isMergingAlone = false;
      });
  }

  endAll(): void {
    for (const stream of this.#streams) stream.destroy();
  }

  #askForPages(): void {
    const { ticket } = this.#desk;
    if (ticket) this.#options.askForPages(ticket);
  }
}
