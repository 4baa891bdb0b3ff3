/**
 * A session at work: one stream of bytes both ways that outlives the connections which carry it.
 *
 *   open       bytes flow while there is a connection, and wait while there is none
 *   closing    our last frame (DONE or RESET) must reach the peer; it answers with DONE
 *   answering  the peer's last frame is here; we answer with DONE and wait until it hangs up
 *   released   no connection and no timer; a reader may still take what has arrived
 *
 * A client that has sent and received everything closes with DONE; the server stays open for it, because it cannot
 * know otherwise whether its last ACK arrived. Whatever fails closes with RESET.
 */
import type { Socket } from 'node:net';
import { Duplex } from 'node:stream';
import { finished } from 'node:stream/promises';
import { AppError } from '../model/errors.ts';
import { KiB } from '../model/units.ts';
import type { Carrier, CarrierOwner } from './carrier.ts';
import { gaveUp, protocolError, publicReason, resetByPeer } from './errors.ts';
import { encodeFrame } from './frame-encoder.ts';
import type { Frame, LastFrame } from './frames.ts';
import { Heartbeat } from './heartbeat.ts';
import type { JsonObject } from './json.ts';
import type { LinkLimits } from './limits.ts';
import type { LinkPurpose } from './purposes.ts';
import { Receiver } from './receiver.ts';
import { Sender, type SharedLimits } from './sender.ts';
import type { Session, SessionFacts, SessionStats } from './session.ts';
import { SocketJoint } from './socket-joint.ts';

export interface LinkSessionOptions {
  side: 'client' | 'server';
  limits: LinkLimits;
  sharedLimits?: SharedLimits | undefined;
}

export class LinkSession extends Duplex implements Session {
  readonly id: string;
  readonly purpose: LinkPurpose;
  readonly cloudletId: string;
  readonly hello: JsonObject;
  readonly gone: Promise<void>;
  readonly #side: 'client' | 'server';
  readonly #limits: LinkLimits;
  readonly #sender: Sender;
  readonly #receiver: Receiver;
  readonly #heartbeat = new Heartbeat();
  readonly #released = Promise.withResolvers<void>();
  readonly #owner: CarrierOwner;
  #state: 'open' | 'closing' | 'answering' | 'released' = 'open';
  #carrier: Carrier | undefined;
  #connections = 0;
  #lostBecause: AppError | undefined;
  #mayReconnect = true;
  #readerWaits = false;
  #endGiven = false;
  #joint: SocketJoint | undefined;
  #last: LastFrame | undefined;
  #lastSent = false;
  /** While open: without a connection for too long. Afterwards: the peer took too long to hear the end. */
  #endTimer: NodeJS.Timeout | undefined;

  constructor(facts: SessionFacts, { side, limits, sharedLimits = { limiters: [] } }: LinkSessionOptions) {
    super({ readableHighWaterMark: 64 * KiB, writableHighWaterMark: 256 * KiB, allowHalfOpen: true });
    this.id = facts.id;
    this.purpose = facts.purpose;
    this.cloudletId = facts.cloudletId;
    this.hello = facts.hello;
    this.gone = this.#released.promise;
    this.#side = side;
    this.#limits = limits;
    this.#sender = new Sender(limits.maxWindowBytes, sharedLimits, () => this.#carrier?.kick());
    this.#receiver = new Receiver(limits, () => this.#carrier?.kick());
    this.#owner = {
      onFrame: (frame) => this.#onFrame(frame),
      nextOutput: () => this.#nextOutput(),
      onTick: () => this.#onTick(),
      onLost: (reason) => this.#onLost(reason),
    };
  }

  get stats(): SessionStats {
    return {
      connected: this.#carrier !== undefined,
      rttMs: this.#heartbeat.rttMs ?? null,
      leastRttMs: this.#heartbeat.leastRttMs ?? null,
      ...this.#sender.stats,
      receivedBytes: this.#receiver.receivedBytes,
      windowBytes: this.#receiver.windowBytes,
      reconnects: Math.max(0, this.#connections - 1),
    };
  }

  /** A connection would serve a purpose: there are bytes to move, or the peer must hear how it ended. */
  get wantsConnection(): boolean {
    return this.#state === 'open' || (this.#state === 'closing' && this.#mayReconnect);
  }

  /** What HELLO or WELCOME tells the peer. */
  get position(): { received: number; limit: number } {
    return this.#receiver.position;
  }

  carry(socket: Socket): Promise<void> {
    this.#joint = new SocketJoint(socket, {
      room: () => this.#sender.room(),
      fill: (lengthBytes, onRoom) => {
        this.#sender.fill(lengthBytes);
        this.#carrier?.kick();
        // Only now, for what was sent at once has made room.
        if (!this.#sender.hasRoom) this.#sender.whenRoom(onRoom);
        return this.#sender.hasRoom;
      },
      end: () => this.end(),
      first: () => this.#receiver.first(),
      drop: (lengthBytes) => {
        this.#receiver.drop(lengthBytes, this.#heartbeat.leastRttMs);
        this.#considerAck();
      },
      hasEnded: () => this.#receiver.drained && !this.destroyed,
      endTaken: () => {
        this.#giveEnd();
        // Nobody else reads the stream.
        this.resume();
      },
    });
    this.#feed();
    return Promise.all([finished(socket), finished(this)]).then(() => {});
  }

  setRateLimit(rateBps: number | null): void {
    this.#sender.setRate(rateBps);
  }

  abandon(reason?: AppError): Promise<void> {
    if (!this.destroyed) this.destroy(reason);
    this.#mayReconnect = false;
    if (this.#carrier === undefined || this.#state === 'open') this.#release();
    else if (this.#state !== 'released') this.#releaseAfter(this.#limits.helloTimeoutMs);
    return this.gone;
  }

  override async [Symbol.asyncDispose](): Promise<void> {
    await this.abandon();
  }

  /** A connection whose handshake is done replaces the one before. `peer` is what its HELLO or WELCOME said. */
  attach(carrier: Carrier, peer: { received: number; limit: number }): void {
    this.#carrier?.destroy();
    this.#carrier = carrier;
    this.#connections += 1;
    this.#lastSent = false;
    this.#heartbeat.restart();
    this.#receiver.restart();
    if (this.#state === 'open') {
      clearTimeout(this.#endTimer);
      const refused = this.#sender.resume(peer.received, peer.limit);
      if (refused) this.destroy(protocolError(`it resumes at byte ${peer.received}: ${refused}`));
    }
    this.emit('connected');
    carrier.handTo(this.#owner);
  }

  /** Ends the session without telling the peer, which knows or cannot be reached. */
  fail(reason: AppError): void {
    this.#release();
    if (!this.destroyed) this.destroy(reason);
  }

  override _read(): void {
    this.#readerWaits = true;
    this.#feed();
  }

  override _write(bytes: Buffer, _encoding: BufferEncoding, done: () => void): void {
    this.#sender.write(bytes, done);
    this.#carrier?.kick();
  }

  override _final(done: () => void): void {
    this.#sender.end(done);
    this.#carrier?.kick();
  }

  override _destroy(error: Error | null, done: (error: Error | null) => void): void {
    this.#receiver.clear();
    if (this.#state === 'open') {
      const complete = this.#sender.delivered && this.#endGiven;
      if (error || !complete) this.#close({ type: 'reset', ...publicReason(error ?? endedEarly()) });
      else if (this.#side === 'client') this.#close({ type: 'done' });
    }
    done(error);
  }

  #close(last: LastFrame): void {
    this.#state = 'closing';
    this.#last = last;
    this.#sender.clear();
    this.#releaseAfter(this.#limits.giveUpMs);
    this.#carrier?.kick();
  }

  #release(): void {
    if (this.#state === 'released') return;
    this.#state = 'released';
    this.#carrier?.destroy();
    this.#carrier = undefined;
    clearTimeout(this.#endTimer);
    this.#sender.clear();
    this.#receiver.pause();
    this.#released.resolve();
  }

  #releaseAfter(ms: number): void {
    clearTimeout(this.#endTimer);
    this.#endTimer = setTimeout(() => this.#release(), ms);
  }

  #onTick(): void {
    this.#heartbeat.tick();
    this.#carrier?.kick();
  }

  #onLost(reason: AppError): void {
    this.#carrier = undefined;
    this.#lostBecause = reason;
    this.#sender.pause();
    this.#receiver.pause();
    if (this.#state === 'open' && reason.details.reason === 'protocol') this.destroy(reason);
    if (this.#state === 'open') {
      this.#endTimer = setTimeout(() => this.#giveUp(), this.#limits.giveUpMs);
    } else if (this.#state === 'answering' || !this.#mayReconnect) {
      this.#release();
    }
    this.emit('disconnected', reason);
  }

  #giveUp(): void {
    this.fail(gaveUp(this.#limits.giveUpMs, this.#lostBecause));
  }

  #onFrame(frame: Frame): void {
    if (frame.type === 'ping') {
      this.#heartbeat.onPing(frame.token);
      this.#carrier?.kick();
    } else if (frame.type === 'pong') {
      this.#heartbeat.onPong(frame.token);
    } else if (frame.type === 'reset' || frame.type === 'done') {
      this.#onLast(frame);
    } else if (this.#state === 'open') {
      const refused = this.#onStreamFrame(frame);
      if (refused) this.destroy(protocolError(`its ${frame.type} was refused: ${refused}`));
    }
  }

  /** DATA, END and ACK; the answer is why the frame must not be. */
  #onStreamFrame(frame: Frame): string | undefined {
    if (frame.type === 'ack') {
      const refused = this.#sender.onAck(frame.received, frame.limit, this.#heartbeat.rttMs);
      if (!refused) this.#carrier?.kick();
      return refused;
    }
    if (frame.type !== 'data' && frame.type !== 'end') return 'it has no place in a session';
    const refused =
      frame.type === 'data'
        ? this.#receiver.onData(frame.offset, frame.bytes)
        : this.#receiver.onEnd(frame.offset);
    if (!refused) this.#feed();
    return refused;
  }

  #onLast(frame: LastFrame): void {
    if (this.#state !== 'open') {
      this.#release();
      return;
    }
    const complete = this.#side === 'server' && this.#sender.delivered && this.#receiver.ended;
    if (frame.type === 'done' && !complete) {
      this.destroy(protocolError('it is done before the session is'));
      return;
    }
    this.#state = 'answering';
    this.#last = { type: 'done' };
    this.#releaseAfter(this.#limits.helloTimeoutMs);
    if (frame.type === 'reset') this.destroy(resetByPeer(frame.code, frame.message));
    this.#carrier?.kick();
  }

  /** Gives the reader what it asks for; what it takes makes room in the window. */
  #feed(): void {
    if (this.#joint) this.#joint.arrived();
    else this.#feedReader();
    this.#considerAck();
  }

  #feedReader(): void {
    while (this.#readerWaits) {
      const bytes = this.#receiver.next(this.#heartbeat.leastRttMs);
      if (bytes === undefined) break;
      this.#readerWaits = false;
      // A reader may ask for more before push returns.
      if (this.push(bytes)) this.#readerWaits = true;
    }
    if (this.#receiver.drained && !this.destroyed) this.#giveEnd();
  }

  #giveEnd(): void {
    if (this.#endGiven) return;
    this.#endGiven = true;
    this.push(null);
  }

  #considerAck(): void {
    if (this.#state === 'open' && this.#carrier && this.#receiver.considerAck()) this.#carrier.kick();
  }

  #nextOutput(): Uint8Array[] | undefined {
    const control = [...this.#heartbeat.take(), ...this.#receiver.take()];
    if (this.#last && !this.#lastSent) {
      control.push(encodeFrame(this.#last));
      this.#lastSent = true;
    }
    if (control.length > 0) return [Buffer.concat(control)];
    return this.#state === 'open' ? this.#sender.take() : undefined;
  }
}

const endedEarly = (): AppError => new AppError('cancelled', 'The session was closed before its end');
