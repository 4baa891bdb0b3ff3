/**
 * Runs one program to its end, without a shell. Time, output and the caller's patience are bounded; a program
 * that outlives them is killed. Used for `qemu-img`, `xorriso`, `cp` and `ip`, never for QEMU itself.
 */
import { execFile } from 'node:child_process';
import { AppError } from '../model/errors.ts';
import { MiB } from '../model/units.ts';
import { cancellation } from './cancel.ts';

export interface RunOptions {
  signal: AbortSignal;
  timeoutMs?: number;
  maxOutputBytes?: number;
  /** Added to a small fixed environment; nothing of the daemon's own reaches the program. */
  env?: Record<string, string>;
}

export interface RunResult {
  stdout: string;
  stderr: string;
}

/** The program ran and failed. The caller knows what that means and turns it into an `AppError`. */
export class CommandFailed extends Error {
  readonly exitCode: number | undefined;
  readonly stdout: string;
  readonly stderr: string;

  constructor(what: string, exitCode: number | undefined, result: RunResult) {
    super(`${what}: ${exitCode === undefined ? 'killed' : `exit ${exitCode}`}: ${tail(result.stderr)}`);
    this.name = 'CommandFailed';
    this.exitCode = exitCode;
    this.stdout = result.stdout;
    this.stderr = result.stderr;
  }
}

/**
 * Output of the program when it ended with exit code 0. Throws `CommandFailed` for any other end, and `AppError`
 * with `timeout`, `cancelled`, or `unsupported` when the program is not installed.
 */
export function run(command: string, args: readonly string[], options: RunOptions): Promise<RunResult> {
  const { signal, timeoutMs = 60_000, maxOutputBytes = 4 * MiB, env = {} } = options;
  const what = `Run ${command} ${args.join(' ')}`;
  return new Promise((resolve, reject) => {
    const child = execFile(
      command,
      args,
      {
        signal,
        timeout: timeoutMs,
        maxBuffer: maxOutputBytes,
        killSignal: 'SIGKILL',
        env: { PATH: process.env.PATH ?? '/usr/sbin:/usr/bin:/sbin:/bin', LC_ALL: 'C', ...env },
      },
      (error, stdout, stderr) => {
        if (!error) resolve({ stdout, stderr });
        else reject(explain(error, what, command, { stdout, stderr }, timeoutMs));
      },
    );
    child.stdin?.end();
  });
}

function explain(
  error: Error & { code?: unknown; killed?: boolean },
  what: string,
  command: string,
  result: RunResult,
  timeoutMs: number,
): Error {
  if (error.name === 'AbortError') return cancellation(error.cause, what);
  if (error.code === 'ENOENT')
    return new AppError('unsupported', `${what}: ${command} is not installed`, { missing: command });
  if (error.code === 'ERR_CHILD_PROCESS_STDIO_MAXBUFFER')
    return new CommandFailed(`${what} (more output than allowed)`, undefined, result);
  if (error.killed)
    return new AppError('timeout', `${what}: no end after ${timeoutMs} ms`, {
      waitedFor: command,
      timeoutMs,
    });
  return new CommandFailed(what, typeof error.code === 'number' ? error.code : undefined, result);
}

const tail = (text: string): string => text.trim().slice(-1000);
