/** Statistics of round trips to one host, by the estimators that TCP and RTP use. Pure. */
import type { RttStats } from '../model/follow.ts';

const lossGain = 1 / 16;

export const noRtt: RttStats = Object.freeze({
  samples: 0,
  smoothedMs: 0,
  variationMs: 0,
  jitterMs: 0,
  minMs: Number.POSITIVE_INFINITY,
  lastMs: 0,
  lossRatio: 0,
  lostInRow: 0,
  answeredAtMs: 0,
});

/** The statistics with one probe more: its round trip in milliseconds, or that it was lost. */
export function observeRtt(stats: RttStats, sampleMs: number | 'lost', atMs: number): RttStats {
  if (sampleMs === 'lost') {
    const lossRatio = stats.lossRatio + (1 - stats.lossRatio) * lossGain;
    return { ...stats, lossRatio, lostInRow: stats.lostInRow + 1 };
  }
  if (!Number.isFinite(sampleMs) || sampleMs < 0) {
    throw new RangeError(`A round trip took ${sampleMs} ms, wanted a number of at least 0`);
  }
  const first = stats.samples === 0;
  const deviation = Math.abs(sampleMs - stats.smoothedMs);
  return {
    samples: stats.samples + 1,
    smoothedMs: first ? sampleMs : stats.smoothedMs + (sampleMs - stats.smoothedMs) / 8,
    variationMs: first ? sampleMs / 2 : stats.variationMs + (deviation - stats.variationMs) / 4,
    jitterMs: first ? 0 : stats.jitterMs + (Math.abs(sampleMs - stats.lastMs) - stats.jitterMs) / 16,
    minMs: Math.min(stats.minMs, sampleMs),
    lastMs: sampleMs,
    lossRatio: stats.lossRatio * (1 - lossGain),
    lostInRow: 0,
    answeredAtMs: atMs,
  };
}
