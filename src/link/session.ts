/** What users of the link see of a session. */
import type { Socket } from 'node:net';
import type { Duplex } from 'node:stream';
import type { AppError } from '../model/errors.ts';
import type { JsonObject } from './json.ts';
import type { LinkPurpose } from './purposes.ts';

/** What a session is, the same at both ends but for the peer. */
export interface SessionFacts {
  /** 32 hex digits, random. */
  readonly id: string;
  readonly purpose: LinkPurpose;
  /** Who is at the other end, as its certificate says. */
  readonly cloudletId: string;
  /** What the client said that the session is about. */
  readonly hello: JsonObject;
}

export interface SessionStats {
  connected: boolean;
  /** Smoothed round trip of the present connection; null before the first PONG. */
  rttMs: number | null;
  /** The shortest round trip of the present connection. */
  leastRttMs: number | null;
  /** How fast bytes arrive at the peer, in bits per second: the best of the last second or so. */
  deliveryRateBps: number;
  /** Bytes of the stream that were sent, each counted once. */
  sentBytes: number;
  /** Bytes that were sent again after a cut. */
  resentBytes: number;
  receivedBytes: number;
  /** Sent bytes that are kept because the peer has not confirmed them. */
  unacknowledgedBytes: number;
  /** Written bytes that wait for their turn. */
  unsentBytes: number;
  /** The window that we grant. */
  windowBytes: number;
  reconnects: number;
}

/**
 * A Duplex; `finish` means that the peer's daemon has all bytes. Beside the events of streams it emits `connected`
 * and `disconnected` (with the reason as an Error).
 */
export interface Session extends Duplex, SessionFacts {
  readonly stats: SessionStats;
  /** Resolves when nothing is left of the session here: no socket, no timer. `close` may come before it. */
  readonly gone: Promise<void>;
  /**
   * Joins the session with a socket that nobody reads yet: bytes both ways, each end passed on, without a stream between
   * them. Resolves when both directions have ended, and rejects when either side breaks; then both are to be destroyed.
   */
  carry(socket: Socket): Promise<void>;
  /** Limits what this session sends, in bits per second, from now on; null for no limit of its own. */
  setRateLimit(rateBps: number | null): void;
  /**
   * Ends the session now. The peer hears of `reason` if there is a connection; no new one is made for that.
   * Resolves like `gone`.
   */
  abandon(reason?: AppError): Promise<void>;
}
