/**
 * Which relays a slab goes to. Pure: what is known of each relay in, places out. Nothing is reserved there, so all of
 * it is a guess that a relay may answer with *full*.
 */

export interface RelayView {
  /** Neither dead, nor asked for this slab already. */
  canBeAsked: boolean;
  /** What it said last that it would take. */
  freeBytes: number;
  /** Sent and not answered yet. */
  inFlightBytes: number;
  /** To come there by way of other relays. */
  expectedBytes: number;
  /** How fast it takes slabs; `undefined` before that was measured. */
  bytesPerSecond: number | undefined;
}

/** The numbers of the relays; `wait` while they are busy with others; `none` when there will never be enough. */
export type Placement = { relays: number[] } | 'wait' | 'none';

/**
 * A relay may always have so much under way: nobody waits for any of it, and one whose answers are slow to come, on a long
 * way or a busy machine, is not idle for that.
 */
const leastWindowBytes = 4 * 1024 * 1024;
/** And this long it may take with what it has. */
const windowS = 0.5;
/** What a relay is to give on is waited for at the end: one that is slow at it gets little to do. */
const leastPassingBytes = 1024 * 1024;
const mostWindowBytes = 16 * 1024 * 1024;

/** `count` different relays that hold the slab soonest; of equal ones those with the most room. */
export function place(views: readonly RelayView[], slabBytes: number, count: number): Placement {
  const candidates = views
    .map((view, relay) => ({ relay, view, doneS: secondsUntilHeld(view, slabBytes, views) }))
    .filter(({ view }) => view.canBeAsked && roomOf(view) >= slabBytes);
  if (candidates.length < count) return 'none';
  const ready = candidates.filter(({ view }) => view.inFlightBytes < windowOf(view));
  if (ready.length < count) return 'wait';
  ready.sort((a, b) => a.doneS - b.doneS || roomOf(b.view) - roomOf(a.view));
  return { relays: ready.slice(0, count).map(({ relay }) => relay) };
}

/** How much a relay may have to give on to others, by how fast it did so lately. */
export const passingWindowOf = (passedPerSecond: number | undefined): number =>
  Math.min(mostWindowBytes, Math.max(leastPassingBytes, (passedPerSecond ?? 0) * windowS));

export const windowOf = ({ bytesPerSecond }: Pick<RelayView, 'bytesPerSecond'>): number =>
  Math.min(mostWindowBytes, Math.max(leastWindowBytes, (bytesPerSecond ?? 0) * windowS));

const roomOf = ({ freeBytes, inFlightBytes, expectedBytes }: RelayView): number =>
  freeBytes - inFlightBytes - expectedBytes;

/** One that was not measured yet counts as the fastest of the others, so that it soon will be. */
function secondsUntilHeld(view: RelayView, slabBytes: number, all: readonly RelayView[]): number {
  const fastest = Math.max(1, ...all.map(({ bytesPerSecond }) => bytesPerSecond ?? 0));
  return (view.inFlightBytes + slabBytes) / (view.bytesPerSecond ?? fastest);
}
