/**
 * PING and PONG of one session: signs of life, and the round trip that they measure. At most one PING of ours and
 * one answer to the peer wait at any time, however many it sends.
 */
import { encodeFrame } from './frame-encoder.ts';
import { RoundTripMeter } from './meters.ts';

export class Heartbeat {
  readonly #roundTrip = new RoundTripMeter();
  #pongDue: number | undefined;
  #pingDue = false;
  #ping: { token: number; sentMs: number } | undefined;
  #pings = 0;

  /** Undefined before the first PONG of the present connection. */
  get rttMs(): number | undefined {
    return this.#roundTrip.rttMs;
  }

  /** What of it is the path's own. */
  get leastRttMs(): number | undefined {
    return this.#roundTrip.leastRttMs;
  }

  /** A new connection, maybe over another path: measure it at once. */
  restart(): void {
    this.#pongDue = undefined;
    this.#ping = undefined;
    this.#roundTrip.reset();
    this.#pingDue = true;
  }

  /** Time for a PING, unless one is still on its way. */
  tick(): void {
    if (this.#ping === undefined) this.#pingDue = true;
  }

  onPing(token: number): void {
    this.#pongDue = token;
  }

  onPong(token: number): void {
    if (this.#ping?.token !== token) return;
    this.#roundTrip.sample(performance.now() - this.#ping.sentMs);
    this.#ping = undefined;
  }

  /** The frames that are due, to be sent now. */
  take(): Buffer[] {
    const frames: Buffer[] = [];
    if (this.#pongDue !== undefined) frames.push(encodeFrame({ type: 'pong', token: this.#pongDue }));
    this.#pongDue = undefined;
    if (this.#pingDue) {
      this.#pings = (this.#pings + 1) % 2 ** 32;
      this.#ping = { token: this.#pings, sentMs: performance.now() };
      frames.push(encodeFrame({ type: 'ping', token: this.#pings }));
    }
    this.#pingDue = false;
    return frames;
  }
}
