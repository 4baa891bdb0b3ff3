/**
 * How much may be under way over a link that has to stay quick to answer: what fills it and no more. What is queued
 * beyond that, in whatever buffers lie between, is what the next page has to wait behind.
 */
import type { Writable } from 'node:stream';
import type { SessionStats } from '../../link/index.ts';
import { KiB } from '../../model/units.ts';

/** A link may always have so much under way, however slow it seems; and until it has been measured. */
const leastBytes = 32 * KiB;
const unmeasuredBytes = 128 * KiB;
/** The other end holds an acknowledgement back for 20 ms, and processes take their turns. */
const slackMs = 35;

/** What a link measures of itself; `undefined` for one that measures nothing. */
export const statsOf = (link: Writable): SessionStats | undefined =>
  'stats' in link ? (link.stats as SessionStats) : undefined;

export function isShallow(link: Writable): boolean {
  return holdsNoMore(link, statsOf(link)?.deliveryRateBps ?? 0, slackMs);
}

/**
 * No more is under way than the path itself holds at `rateBps`, so that what is written next stands behind nothing. A link
 * that is held so is not full, since acknowledgements take their time, and measures less than it carries.
 */
export function isClear(link: Writable, rateBps: number): boolean {
  return holdsNoMore(link, rateBps, 0);
}

function holdsNoMore(link: Writable, rateBps: number, beyondMs: number): boolean {
  const stats = statsOf(link);
  if (!stats) return true;
  const { unacknowledgedBytes, unsentBytes, leastRttMs } = stats;
  const filledBytes = (rateBps / 8000) * ((leastRttMs ?? 0) + beyondMs);
  const mostBytes = Math.max(rateBps > 0 ? leastBytes : unmeasuredBytes, filledBytes);
  return unacknowledgedBytes + unsentBytes <= mostBytes;
}
