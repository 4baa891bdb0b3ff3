/** What a program prints, line by line, for as long as somebody listens. */
import { spawn } from 'node:child_process';
import { createInterface } from 'node:readline';
import type { Command } from './commands.ts';

export const mptcpMonitorCommand: Command = ['ip', '-t', 'mptcp', 'monitor'];

/** Ends with the program or the signal; the program never outlives the loop. */
export async function* monitorLines(
  [program, ...args]: Command,
  signal: AbortSignal,
): AsyncGenerator<string, void, undefined> {
  const child = spawn(program, args, { stdio: ['ignore', 'pipe', 'ignore'] });
  const ended = new AbortController();
  child.once('error', () => ended.abort());
  const onAbort = () => child.kill('SIGKILL');
  signal.addEventListener('abort', onAbort, { once: true });
  try {
    if (signal.aborted) return;
    for await (const line of createInterface({
      input: child.stdout,
      signal: AbortSignal.any([signal, ended.signal]),
    }))
      yield line;
  } finally {
    signal.removeEventListener('abort', onAbort);
    child.kill('SIGKILL');
  }
}
