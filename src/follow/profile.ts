/**
 * Forecasts that learn (thesis, 4.7): the analytic model of pre-copy says what a migration costs, and what finished
 * migrations came to corrects it. For the total time the correction is a factor, the weighted median of
 * (measured / model) over past migrations; for the downtime it is a term, that of (measured - model), for what the model
 * does not know of it (devices, agents, a busy host) is there however long the last bytes take. A migration weighs more
 * the more it is like this one and the newer it is. The model itself takes part with a fixed weight, so that one odd
 * migration does not carry the forecast away. Pure.
 */
import type { ProfileSample } from '../model/follow.ts';
import type { Uuid } from '../model/ids.ts';

/** What a forecast is wanted for; the features of a sample. */
export type ProfileQuery = Pick<
  ProfileSample,
  | 'peerId'
  | 'way'
  | 'memoryBytes'
  | 'diskBytes'
  | 'dirtyBps'
  | 'bandwidthBps'
  | 'rttMs'
  | 'modelTotalMs'
  | 'modelDowntimeMs'
>;

export interface Corrected {
  totalMs: number;
  downtimeMs: number;
  /** Samples that had a say. */
  learnedFrom: number;
}

/** Of the model, against 1 of a recent sample that is just alike. */
const modelWeight = 0.3;
/** Each newer sample takes this share of the weight of those before it: links and hosts change. */
const forgetting = 0.03;
/** Samples kept; the oldest go. */
export const samplesKept = 500;
/** A factor beyond this is an accident (a link cut for minutes, say) and teaches nothing. */
const largestFactor = 100;

/** `samples` from old to new. */
export function correct(query: ProfileQuery, samples: readonly ProfileSample[]): Corrected {
  const weighed = samples
    .map((sample, index) => ({
      sample,
      weight: likeness(query, sample) * (1 - forgetting) ** (samples.length - 1 - index),
    }))
    .filter(({ weight }) => weight > 0.01);
  const learned = (of: (sample: ProfileSample) => number) =>
    weightedMedian([
      { value: 0, weight: modelWeight },
      ...weighed.map(({ sample, weight }) => ({ value: of(sample), weight })),
    ]);
  const factor = Math.exp(learned((each) => logRatio(each.totalMs, each.modelTotalMs)));
  const termMs = learned((each) => each.downtimeMs - each.modelDowntimeMs);
  return {
    totalMs: Math.round(query.modelTotalMs * factor),
    downtimeMs: Math.max(1, Math.round(query.modelDowntimeMs + termMs)),
    learnedFrom: weighed.length,
  };
}

/** Whether a finished migration teaches anything. */
export function isUsable({ totalMs, downtimeMs, modelTotalMs, modelDowntimeMs }: ProfileSample): boolean {
  const ratios = [totalMs / modelTotalMs, downtimeMs / modelDowntimeMs];
  return ratios.every((ratio) => ratio > 1 / largestFactor && ratio < largestFactor);
}

/** The samples of two cloudlets as one list from old to new, each migration once. */
export function mergeSamples(
  own: readonly ProfileSample[],
  heard: readonly ProfileSample[],
): ProfileSample[] {
  const known = new Map<Uuid, ProfileSample>();
  // Our own word on a migration goes before that of others.
  for (const sample of [...heard, ...own]) if (isUsable(sample)) known.set(sample.migrationId, sample);
  return [...known.values()].toSorted((a, b) => (a.at < b.at ? -1 : 1)).slice(-samplesKept);
}

/** 1 for one that is just alike, towards 0 for one that is not: a Gaussian over the logarithms of the features. */
function likeness(query: ProfileQuery, sample: ProfileSample): number {
  const apart = (a: number, b: number, width: number) => (Math.log2((a + 1) / (b + 1)) / width) ** 2;
  const distance =
    apart(query.modelTotalMs, sample.modelTotalMs, 2) +
    apart(query.memoryBytes, sample.memoryBytes, 2) +
    apart(query.diskBytes + 1e6, sample.diskBytes + 1e6, 3) +
    apart(query.dirtyBps + 1e6, sample.dirtyBps + 1e6, 2) +
    apart(query.bandwidthBps, sample.bandwidthBps, 2) +
    apart(query.rttMs + 5, sample.rttMs + 5, 2);
  const sameWay = query.way === sample.way ? 1 : 0.2;
  const samePeer = query.peerId === sample.peerId ? 1 : 0.5;
  return Math.exp(-distance / 2) * sameWay * samePeer;
}

const logRatio = (measured: number, model: number): number =>
  Math.log(Math.max(1, measured) / Math.max(1, model));

function weightedMedian(items: { value: number; weight: number }[]): number {
  const sorted = items.toSorted((a, b) => a.value - b.value);
  const half = sorted.reduce((sum, { weight }) => sum + weight, 0) / 2;
  let sum = 0;
  for (const { value, weight } of sorted) {
    sum += weight;
    if (sum >= half) return value;
  }
  return 0;
}

/** A running estimate of one duration; the first one counts whole. */
export const learnMs = (known: number | undefined, measuredMs: number): number =>
  known === undefined ? measuredMs : known + (measuredMs - known) / 4;

/**
 * By how much the RTT to the device grows while a migration fills the link, as long as nobody has measured it: the
 * queue of a bottleneck is commonly sized for one round trip, so it at most doubles the way over the WAN.
 */
export const assumedDeltaRttMs = (neighbourRttMs: number): number => Math.round(neighbourRttMs);
