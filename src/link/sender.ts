/** The sending half of a session at work: cuts what was written into frames, at the rate that the limiters allow. */
import { encodeFrame, encodeRun } from './frame-encoder.ts';
import { maxDataBytes } from './frames.ts';
import { DeliveryMeter } from './meters.ts';
import { Outgoing, type OutgoingRefusal } from './outgoing.ts';
import { Pacing, RateLimiter } from './rate-limiter.ts';

/** Limits that a session has together with others. */
export interface SharedLimits {
  /** Bytes go when each has granted them. */
  limiters: readonly RateLimiter[];
  /** Sessions of one party take one share together. */
  party?: object;
}

/** So many bytes may wait unsent before the writer has to. */
const enoughBytes = maxDataBytes;

export class Sender {
  readonly #outgoing: Outgoing;
  readonly #delivery = new DeliveryMeter();
  readonly #ownLimiter = new RateLimiter(null);
  readonly #pacing: Pacing;
  /** The limiters have let bytes go, outside of any call. */
  readonly #onGrant: () => void;
  #grantedBytes = 0;
  #writeDone: (() => void) | undefined;
  #endDone: (() => void) | undefined;

  constructor(maxInFlightBytes: number, shared: SharedLimits, onGrant: () => void) {
    this.#outgoing = new Outgoing(maxInFlightBytes);
    this.#pacing = new Pacing([this.#ownLimiter, ...shared.limiters], shared.party);
    this.#onGrant = onGrant;
  }

  /** The peer has every byte and knows that there are no more. */
  get delivered(): boolean {
    return this.#outgoing.endAcknowledged;
  }

  get stats() {
    return {
      deliveryRateBps: this.#delivery.rateBps,
      sentBytes: this.#outgoing.sentBytes,
      resentBytes: this.#outgoing.resentBytes,
      unacknowledgedBytes: this.#outgoing.unacknowledgedBytes,
      unsentBytes: this.#outgoing.unsentBytes,
    };
  }

  setRate(rateBps: number | null): void {
    this.#ownLimiter.setRate(rateBps);
  }

  /** Takes a copy; `done` is called when there is room for more. */
  write(bytes: Uint8Array, done: () => void): void {
    this.#outgoing.write(bytes);
    if (this.hasRoom) done();
    else this.#writeDone = done;
  }

  /** For one who puts the bytes where they stay: `fill` says how many were. */
  room(): Uint8Array {
    return this.#outgoing.room();
  }

  fill(lengthBytes: number): void {
    this.#outgoing.fill(lengthBytes);
  }

  get hasRoom(): boolean {
    return this.#outgoing.unsentBytes <= enoughBytes;
  }

  /** `done` is called once when there is room again. */
  whenRoom(done: () => void): void {
    this.#writeDone = done;
  }

  /** `done` is called when the peer has everything. */
  end(done: () => void): void {
    this.#outgoing.end();
    this.#endDone = done;
  }

  onAck(received: number, limit: number, rttMs: number | undefined): OutgoingRefusal | undefined {
    const before = this.#outgoing.acknowledgedBytes;
    const refused = this.#outgoing.acknowledge(received, limit);
    if (refused) return refused;
    const nowMs = performance.now();
    const delivered = this.#outgoing.acknowledgedBytes - before;
    if (delivered > 0) this.#delivery.delivered(delivered, nowMs, rttMs);
    if (this.#outgoing.unacknowledgedBytes + this.#outgoing.unsentBytes === 0) this.#delivery.pause(nowMs);
    this.#settleEnd();
    return undefined;
  }

  /** A new connection: goes on where the peer is. */
  resume(received: number, limit: number): OutgoingRefusal | undefined {
    const refused = this.#outgoing.resume(received, limit);
    if (!refused) this.#settleEnd();
    return refused;
  }

  /** The connection is gone. */
  pause(): void {
    this.#pacing.withdraw();
    this.#grantedBytes = 0;
    this.#delivery.pause(performance.now());
  }

  /** Forgets the bytes; the session has ended. */
  clear(): void {
    this.pause();
    this.#outgoing.clear();
  }

  /** The next DATA or END, to be sent now. */
  take(): Uint8Array[] | undefined {
    const sendableBytes = this.#outgoing.sendableBytes();
    if (sendableBytes === 0) {
      if (!this.#outgoing.endDue) return undefined;
      return [encodeFrame({ type: 'end', offset: this.#outgoing.takeEnd() })];
    }
    const run = this.#outgoing.take(this.#allowedBytes(sendableBytes));
    if (run && this.#writeDone && this.hasRoom) {
      const done = this.#writeDone;
      this.#writeDone = undefined;
      done();
    }
    return run && encodeRun(run);
  }

  /** How many bytes may go now; 0 while the limiters make us wait. */
  #allowedBytes(sendableBytes: number): number {
    if (this.#grantedBytes === 0 && !this.#pacing.waiting) {
      if (this.#pacing.unlimited) return maxDataBytes;
      const wantedBytes = Math.min(sendableBytes, this.#pacing.quantumBytes, maxDataBytes);
      this.#pacing.request(wantedBytes, () => {
        this.#grantedBytes = wantedBytes;
        this.#onGrant();
      });
    }
    const allowedBytes = this.#grantedBytes;
    this.#grantedBytes = 0;
    return allowedBytes;
  }

  #settleEnd(): void {
    if (!this.#outgoing.endAcknowledged) return;
    this.#endDone?.();
    this.#endDone = undefined;
  }
}
