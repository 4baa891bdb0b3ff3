/**
 * Progress on stderr: a bar on a terminal, else a line for each phase. Also the end of every command that does
 * long work: wait, and on Ctrl-C say that the work goes on.
 */
import { SingleBar } from 'cli-progress';
import type { Command } from 'commander';
import { formatBytes } from '../model/units.ts';
import type { Operation } from '../sdk/client.ts';
import { Interrupted } from './failures.ts';
import type { Output } from './output.ts';
import type { Session } from './session.ts';
import { parseDuration } from './values.ts';

export interface Progress {
  phase: string;
  done: number;
  total: number;
  unit: 'bytes' | 'steps';
}

export interface ProgressView extends Disposable {
  update(progress: Progress): void;
}

const barWidth = 30;

/** Shows nothing with --quiet. Disposing takes the bar away. */
export function showProgress(title: string, output: Output): ProgressView {
  if (output.quiet) return { update() {}, [Symbol.dispose]() {} };
  return process.stderr.isTTY ? progressBar(title) : progressLines(title, output);
}

function progressBar(title: string): ProgressView {
  const bar = new SingleBar({
    stream: process.stderr,
    clearOnComplete: true,
    hideCursor: true,
    barsize: barWidth,
    etaBuffer: 50,
    format: `${title} [{bar}] {amount} {phase}`,
    barCompleteChar: '=',
    barIncompleteChar: ' ',
    // Otherwise cli-progress ends the process by itself.
    gracefulExit: false,
  });
  let started = false;
  return {
    update({ phase, done, total, unit }) {
      const end = Math.max(total, 1);
      const amount = unit === 'bytes' ? `${formatBytes(done)} of ${formatBytes(total)}` : `${done}/${total}`;
      if (!started) bar.start(end, Math.min(done, end), { phase, amount });
      started = true;
      bar.setTotal(end);
      bar.update(Math.min(done, end), { phase, amount });
    },
    [Symbol.dispose]() {
      if (started) bar.stop();
    },
  };
}

/** One line for each phase, where there is no terminal. */
export function progressLines(
  title: string,
  output: Output,
): { update(progress: { phase: string }): void } & Disposable {
  let told: string | undefined;
  return {
    update({ phase }) {
      if (phase !== told) output.note(`${title}: ${phase}`);
      told = phase;
    },
    [Symbol.dispose]() {},
  };
}

export interface LongWorkOptions {
  /** False with --no-wait. */
  wait: boolean;
  /** Milliseconds. */
  timeout?: number;
}

export const addLongWorkOptions = (command: Command): Command =>
  command
    .option('--no-wait', 'print the id of the operation and do not wait for its end')
    .option('--timeout <time>', 'how long to wait; the work itself goes on', parseDuration);

/** Waits for the operation, unless --no-wait, and says what was `done`. */
export async function finish(
  session: Session,
  operation: Operation,
  options: LongWorkOptions,
  done: (operation: Operation) => string,
): Promise<void> {
  const { output } = session;
  if (!options.wait) return output.show(operation, () => output.line(operation.id));
  const ended = await follow(session, operation, options.timeout);
  output.show(ended, () => output.say(done(ended)));
}

/** The operation once it has succeeded, with its progress shown meanwhile. */
export async function follow(
  { viper, output, signal }: Session,
  operation: Operation | string,
  timeoutMs?: number,
): Promise<Operation> {
  const id = typeof operation === 'string' ? operation : operation.id;
  let view: ProgressView | undefined;
  const onProgress = ({ kind, subject, progress }: Operation) => {
    view ??= showProgress(subject.name ? `${kind} ${subject.name}` : kind, output);
    if (progress) view.update(progress);
  };
  try {
    return await viper.wait(operation, {
      signal,
      onProgress,
      ...(timeoutMs === undefined ? {} : { timeoutMs }),
    });
  } catch (error) {
    if (!(error instanceof Interrupted)) throw error;
    throw new Interrupted(
      `not waiting any longer, but operation ${id} goes on\n` +
        `  watch it:  viper operation watch ${id}\n  cancel it: viper operation cancel ${id}`,
    );
  } finally {
    view?.[Symbol.dispose]();
  }
}
