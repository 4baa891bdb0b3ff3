/** Every bound of the link in one place, with its default and the reason for it. */
import { AppError } from '../model/errors.ts';
import { KiB, MiB } from '../model/units.ts';

/** All are optional for callers; `resolveLimits` fills the rest in. */
export interface LinkLimits {
  /** The receive window at first. It grows while the reader takes more than half of it in a round trip. */
  initialWindowBytes: number;
  /**
   * The most that a receiver grants, and the most that a sender keeps for resending whatever it is granted.
   * 16 MiB fills 0.9 Gbit/s at 150 ms.
   */
  maxWindowBytes: number;
  /** How often each side asks for a sign of life, which also measures the round trip. */
  pingMs: number;
  /** A connection is dead when this long not a byte came over it. */
  deadAfterMs: number;
  /** One attempt to connect: TCP, TLS and the answer to HELLO. */
  connectTimeoutMs: number;
  /** How long `openSession` goes on trying before it fails. */
  openTimeoutMs: number;
  /** How long a server waits for HELLO, and for a refused client to hang up. */
  helloTimeoutMs: number;
  /** The first and the longest rest between attempts to connect. */
  firstBackOffMs: number;
  mostBackOffMs: number;
  /** A session without a connection for this long ends with `peer_unreachable`. */
  giveUpMs: number;
  /** Small progress is acknowledged after this long at the latest. */
  ackDelayMs: number;
}

export const defaultLimits: Readonly<LinkLimits> = {
  initialWindowBytes: 256 * KiB,
  maxWindowBytes: 16 * MiB,
  pingMs: 1000,
  deadAfterMs: 5000,
  connectTimeoutMs: 5000,
  openTimeoutMs: 10_000,
  helloTimeoutMs: 5000,
  firstBackOffMs: 100,
  mostBackOffMs: 1000,
  giveUpMs: 600_000,
  ackDelayMs: 20,
};

/** Longer timers are clamped to 1 ms by Node. */
const maxTimerMs = 2 ** 31 - 1;

/** The defaults with the given ones in their places. Errors: `invalid_request` for one that makes no sense. */
export function resolveLimits(given: Partial<LinkLimits> = {}): LinkLimits {
  const limits = { ...defaultLimits, ...given };
  for (const [field, value] of Object.entries(limits)) {
    const most = field.endsWith('Ms') ? maxTimerMs : Number.MAX_SAFE_INTEGER;
    if (!(value >= 1 && value <= most)) {
      throw new AppError('invalid_request', `Cannot take ${value} for ${field} of a link`, {
        problems: [{ field, value, wanted: `a number from 1 to ${most}` }],
      });
    }
  }
  limits.initialWindowBytes = Math.min(limits.initialWindowBytes, limits.maxWindowBytes);
  return limits;
}
