/**
 * One TLS connection that carries a session for a while. It reads frames, asks its owner for the next bytes when
 * the socket has taken the last ones, and finds out when the connection is dead.
 *
 * Invariants: at most one frame waits in the socket, so what a session has to say next is decided as late as
 * possible (what the kernel took is out of reach: Node cannot set SO_SNDBUF); `onLost` is called once, and nothing
 * after it.
 */
import type { TLSSocket } from 'node:tls';
import { AppError } from '../model/errors.ts';
import { KiB } from '../model/units.ts';
import { FrameDecoder } from './frame-decoder.ts';
import type { Frame } from './frames.ts';
import type { LinkLimits } from './limits.ts';
import { readInto } from './read-into.ts';

/** The most that a TLS record holds. */
const readBytes = 16 * KiB;

/** Who uses the connection; it changes from the handshake to the session. */
export interface CarrierOwner {
  onFrame(frame: Frame): void;
  /** What to write next; undefined for nothing now, then `kick` when there is something. */
  nextOutput(): Uint8Array[] | undefined;
  /** `pingMs` has passed: time for a PING. */
  onTick(): void;
  /** The connection is gone. A frame that is none is the peer's fault, anything else a cut. */
  onLost(reason: AppError): void;
}

export class Carrier {
  readonly #socket: TLSSocket;
  readonly #decoder = new FrameDecoder();
  readonly #ticker: NodeJS.Timeout;
  readonly #silentTicksToDie: number;
  #owner: CarrierOwner;
  #silentTicks = 0;
  #writing: Uint8Array[] = [];
  #busy = false;
  #lost = false;

  /** Takes over a connected socket. */
  constructor(socket: TLSSocket, limits: LinkLimits, owner: CarrierOwner) {
    this.#socket = socket;
    this.#owner = owner;
    // Ticks are counted instead of time: a process that slept does not find all its peers dead when it wakes up.
    this.#silentTicksToDie = Math.max(2, Math.ceil(limits.deadAfterMs / limits.pingMs));
    socket.setNoDelay(true);
    // One record at a time, and every byte of it is used or copied at once.
    const buffer = new Uint8Array(readBytes);
    readInto(
      socket,
      () => buffer,
      (bytes) => {
        this.#receive(bytes);
        return true;
      },
    );
    socket.on('error', (error) => this.#lose(cut(error.message, error)));
    socket.on('end', () => this.#lose(cut('the other side closed it')));
    socket.on('close', () => this.#lose(cut('it was closed')));
    this.#ticker = setInterval(() => this.#tick(), limits.pingMs);
  }

  get isLost(): boolean {
    return this.#lost;
  }

  /** From now on another owner is asked and told. */
  handTo(owner: CarrierOwner): void {
    this.#owner = owner;
    this.kick();
  }

  /** The owner may have something to write. */
  kick(): void {
    if (this.#busy || this.#lost) return;
    // Before the owner is asked: what it does to answer may kick again.
    this.#busy = true;
    const output = this.#owner.nextOutput();
    if (output === undefined) {
      this.#busy = false;
      return;
    }
    this.#writing = output;
    this.#writeNext();
  }

  /** Closes the connection. Its owner is not told, because it knows. */
  destroy(): void {
    this.#lost = true;
    clearInterval(this.#ticker);
    this.#socket.destroy();
  }

  /**
   * One by one, each when the socket has passed on the one before: several waiting writes would be copied into one
   * buffer by Node's TLS, which costs more than a record of its own for a header.
   */
  #writeNext(): void {
    const bytes = this.#writing.shift();
    if (bytes === undefined) {
      this.#busy = false;
      this.kick();
      return;
    }
    this.#socket.write(bytes, (error) => {
      if (!error && !this.#lost) this.#writeNext();
    });
  }

  #receive(bytes: Uint8Array): void {
    this.#silentTicks = 0;
    if (this.#lost) return;
    const { frames, refused } = this.#decoder.push(bytes);
    for (const frame of frames) {
      // The frame before may have ended it all.
      if (this.isLost) return;
      this.#owner.onFrame(frame);
    }
    if (refused && !this.isLost) {
      this.#lose(
        new AppError('peer_unreachable', `The peer sent bytes that are no frame: ${refused}`, {
          reason: 'protocol',
          refused,
        }),
      );
    }
  }

  #tick(): void {
    this.#silentTicks += 1;
    if (this.#silentTicks > this.#silentTicksToDie) this.#lose(cut('nothing came over it any more'));
    else this.#owner.onTick();
  }

  #lose(reason: AppError): void {
    if (this.#lost) return;
    this.destroy();
    this.#owner.onLost(reason);
  }
}

const cut = (why: string, cause?: Error): AppError =>
  new AppError(
    'peer_unreachable',
    `The connection to the peer was lost: ${why}`,
    { reason: 'cut' },
    { cause },
  );
