/**
 * A migration on stderr while it runs: a bar on a terminal, else a line for each phase. What is shown never runs
 * backwards, also where answers of a daemon before and after a restart meet.
 */
import { SingleBar } from 'cli-progress';
import { type MigrationPhase, migrationPhases } from '../model/migration.ts';
import { formatBytes } from '../model/units.ts';
import type { MigrationProgress } from '../sdk/client.ts';
import { formatBitRate, formatDuration, type Output } from './output.ts';
import { progressLines } from './progress.ts';

export interface MigrationView extends Disposable {
  update(progress: MigrationProgress): void;
}

const barWidth = 24;

/** Shows nothing with --quiet. Disposing takes the bar away. */
export function showMigration(title: string, output: Output): MigrationView {
  if (output.quiet) return { update() {}, [Symbol.dispose]() {} };
  const show = process.stderr.isTTY ? bar(title) : progressLines(title, output);
  const forward = onlyForward();
  return {
    update: (progress) => show.update(forward(progress)),
    [Symbol.dispose]: () => show[Symbol.dispose](),
  };
}

/** Phase, round, bytes and share of the latest progress, or of an earlier one that was further. */
export function onlyForward(): (progress: MigrationProgress) => MigrationProgress & { fraction: number } {
  let phase: MigrationPhase = 'preflight';
  let round = 0;
  let doneBytes = 0;
  let fraction = 0;
  return (progress) => {
    if (migrationPhases.indexOf(progress.phase) > migrationPhases.indexOf(phase)) phase = progress.phase;
    round = Math.max(round, progress.round);
    doneBytes = Math.max(doneBytes, progress.doneBytes);
    const totalBytes = Math.max(doneBytes, progress.totalBytes);
    fraction = Math.max(fraction, totalBytes === 0 ? 0 : doneBytes / totalBytes);
    return { ...progress, phase, round, doneBytes, totalBytes, fraction };
  };
}

/** `memory, round 2: 1.2 GiB of 2 GiB at 940 Mbit/s, dirties 120 Mbit/s, 12 s left`. */
export function progressText(progress: MigrationProgress): string {
  const { phase, round, doneBytes, totalBytes, dirtyBps, rateBps, etaMs } = progress;
  const where = round > 0 && phase === 'memory' ? `${phase}, round ${round}` : phase;
  if (totalBytes === 0) return where;
  const parts = [
    `${formatBytes(doneBytes)} of ${formatBytes(totalBytes)}${rateBps > 0 ? ` at ${formatBitRate(rateBps)}` : ''}`,
    dirtyBps > 0 ? `dirties ${formatBitRate(dirtyBps)}` : '',
    etaMs === undefined ? '' : `${formatDuration(etaMs)} left`,
  ];
  return `${where}: ${parts.filter((part) => part !== '').join(', ')}`;
}

function bar(
  title: string,
): { update(progress: MigrationProgress & { fraction: number }): void } & Disposable {
  const single = new SingleBar({
    stream: process.stderr,
    clearOnComplete: true,
    hideCursor: true,
    barsize: barWidth,
    format: `${title} [{bar}] {percentage}% {text}`,
    barCompleteChar: '=',
    barIncompleteChar: ' ',
    // Otherwise cli-progress ends the process by itself.
    gracefulExit: false,
  });
  let started = false;
  return {
    update(progress) {
      const text = progressText(progress);
      if (!started) single.start(1, progress.fraction, { text });
      started = true;
      single.update(progress.fraction, { text });
    },
    [Symbol.dispose]() {
      if (started) single.stop();
    },
  };
}
