/** When memory goes over to post-copy. Pure: what QEMU said at the end of each round in, a yes or no out. */
import type { MigrationMode } from '../model/migration.ts';
import { KiB, MiB } from '../model/units.ts';

/** One pass over the dirty memory, as it was when the pass began. */
export interface Round {
  number: number;
  /** What was left to send. */
  remainingBytes: number;
  /** When it began, and how long it will take: where the speed of the link is known. */
  atMs?: number;
  forecastMs?: number;
}

/** A hybrid sends everything once and what changed meanwhile once more; what is left then is what stays hot. */
const hybridRounds = 2;
/** A round that leaves more than this share of the one before does not get to the end in useful time. */
const stalledShare = 0.7;
/** The same in time, where the speed of the link is known. */
const lateShare = 0.5;
/** A round that is so short gets to the end whatever the guest writes. */
const shortMs = 60;

/** `rounds` are those that have begun, oldest first. */
export function isTimeForPostcopy(mode: MigrationMode, rounds: readonly Round[]): boolean {
  const last = rounds.at(-1);
  if (mode === 'precopy' || !last) return false;
  if (mode === 'postcopy') return true;
  if (mode === 'hybrid') return last.number > hybridRounds;
  const [before, previous] = [rounds.at(-3), rounds.at(-2)];
  if (previous?.atMs !== undefined && last.atMs !== undefined && last.forecastMs !== undefined) {
    // What the guest wrote in this time takes nearly as long to send: further rounds would gain little and cost much.
    const tookMs = last.atMs - previous.atMs;
    return last.forecastMs > shortMs && last.forecastMs > tookMs * lateShare;
  }
  if (!before || !previous || last.number <= 3) return false;
  // Twice in a row, for one burst of the guest says little.
  return hasStalled(before, previous) && hasStalled(previous, last);
}

/** Of the pause that may be made for memory: what takes longer comes in another round, or after the VM runs again. */
const shortPauseMs = 40;

/**
 * For how long the VM may stand still for memory that is left. Rounds that get shorter go on to a short pause; a pre-copy
 * whose rounds do not makes the pause that it is allowed.
 */
export function pauseMs(mode: MigrationMode, rounds: readonly Round[], downtimeMs: number): number {
  const [before, previous, last] = [rounds.at(-3), rounds.at(-2), rounds.at(-1)];
  const isStuck = before && previous && last && hasStalled(before, previous) && hasStalled(previous, last);
  return mode === 'precopy' && isStuck ? downtimeMs : Math.min(downtimeMs, shortPauseMs);
}

const hasStalled = (before: Round, after: Round): boolean =>
  after.remainingBytes > before.remainingBytes * stalledShare;

/** Less than a page: only a guest that writes nothing at all is stopped so soon. */
export const nearlyNothingBytes = 4 * KiB;
/** What QEMU gets rid of in a moment, since its pages are only noted. */
const drainedBytes = 8 * MiB;
const anyBytes = 10 ** 12;
/** A guest that writes faster than that is stopped all the same. */
const drainedMs = 1000;

/**
 * With so many bytes left QEMU is to stop the VM that goes over to post-copy. `sampledMs`: since it is known which pages
 * the VM writes all the time; `undefined` until then.
 */
export function switchoverBytes(sampledMs: number | undefined): number {
  if (sampledMs === undefined) return nearlyNothingBytes;
  return sampledMs > drainedMs ? anyBytes : drainedBytes;
}
