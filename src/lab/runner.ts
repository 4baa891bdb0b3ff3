/** Carries out what the other files plan. */
import { once } from 'node:events';
import { connect } from 'node:net';
import { AppError } from '../model/errors.ts';
import type { Command } from '../network/index.ts';
import { killProcess, readProcess, waitUntilGone } from '../vm/process.ts';
import { CommandFailed, run } from '../vm/run.ts';
import {
  listNamespacesCommand,
  listProcessesCommand,
  parseNamespaces,
  parseProcesses,
} from './namespaces.ts';

const goneTimeoutMs = 20_000;
const answerTimeoutMs = 5_000;

/** The standard output. Throws `unsupported` with what the program said, or with its name if it is not installed. */
export async function execute(command: Command, signal = new AbortController().signal): Promise<string> {
  const [program, ...args] = command;
  try {
    return (await run(program, args, { signal })).stdout;
  } catch (error) {
    if (error instanceof CommandFailed)
      throw new AppError('unsupported', `Lab: ${error.message}`, { missing: program }, { cause: error });
    throw error;
  }
}

export async function executeAll(commands: readonly Command[], signal?: AbortSignal): Promise<void> {
  for (const command of commands) await execute(command, signal);
}

/** Gives lines to the program that listens at a management socket of vde2, each once the one before was accepted. */
export async function tell(socketPath: string, lines: readonly string[]): Promise<void> {
  const signal = AbortSignal.timeout(answerTimeoutMs);
  const socket = connect({ path: socketPath });
  let heard = '';
  socket.setEncoding('utf8').on('data', (text: string) => {
    heard += text;
  });
  const answer = async (): Promise<string> => {
    while (!heard.includes('$ ')) await once(socket, 'data', { signal });
    const said = heard;
    heard = '';
    return said;
  };
  try {
    await once(socket, 'connect', { signal });
    await answer();
    for (const line of lines) {
      socket.write(`${line}\n`);
      const said = await answer();
      if (!said.startsWith('1000')) throw new Error(`'${line}' was answered by '${said.trim()}'`);
    }
  } catch (error) {
    const said = error instanceof Error ? error.message : String(error);
    throw new AppError(
      'unsupported',
      `Lab: tell ${socketPath}: ${said}`,
      { missing: 'wirefilter' },
      { cause: error },
    );
  } finally {
    socket.destroy();
  }
}

export const namespacesOf = async (beginning: string): Promise<string[]> =>
  parseNamespaces(await execute(listNamespacesCommand), beginning);

/** Ends all that runs in the namespaces, and waits until it is gone. */
export async function endProcessesIn(namespaces: readonly string[]): Promise<void> {
  const deadline = performance.now() + goneTimeoutMs;
  for (;;) {
    const found = await processesIn(namespaces);
    // One that is ended may have started another before.
    if (found.length === 0) return;
    if (performance.now() > deadline)
      throw new AppError('timeout', `Lab: processes ${found.join(', ')} do not end`, {
        timeoutMs: goneTimeoutMs,
      });
    for (const pid of found) {
      const ref = await readProcess(pid);
      if (!ref) continue;
      await killProcess(ref);
      await waitUntilGone(ref, { timeoutMs: 1000 });
    }
  }
}

export async function processesIn(namespaces: readonly string[]): Promise<number[]> {
  const all: number[] = [];
  for (const namespace of namespaces)
    all.push(...parseProcesses(await execute(listProcessesCommand(namespace))));
  return all;
}
