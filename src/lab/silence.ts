/** Silences between answers, in whatever clock the times are. */

/** The longest silence that has something in common with the span, in ms. `times` ascend. */
export function longestSilence(times: readonly number[], span: { fromMs: number; toMs: number }): number {
  let longest = 0;
  for (const [index, time] of times.entries()) {
    const before = times[index - 1];
    if (before === undefined || time < span.fromMs) continue;
    if (before > span.toMs) break;
    longest = Math.max(longest, time - before);
  }
  return longest;
}
