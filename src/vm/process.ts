/**
 * Processes that may not be our children: found, checked and ended through /proc. A pid alone names nobody, since
 * pids are reused; the start time tells two processes of one pid apart.
 */
import { readdir, readFile } from 'node:fs/promises';
import { setTimeout as sleep } from 'node:timers/promises';
import type { ProcessRef } from '../model/vm.ts';
import { delay } from '../qmp/index.ts';

/** Fields of proc_pid_stat(5). The second, the command, may itself hold spaces and parentheses. */
export function parseStat(text: string): { state: string; startTicks: number } | undefined {
  const fields = text.slice(text.lastIndexOf(')') + 2).split(' ');
  // The first field after the command is number 3; the start time is number 22.
  const [state, startTicks] = [fields[0], Number(fields[22 - 3])];
  return state && Number.isSafeInteger(startTicks) ? { state, startTicks } : undefined;
}

/** The process that has this pid now. A zombie counts as gone: nobody may be there to reap it. */
export async function readProcess(pid: number): Promise<ProcessRef | null> {
  let text: string;
  try {
    text = await readFile(`/proc/${pid}/stat`, 'utf8');
  } catch {
    return null;
  }
  const stat = parseStat(text);
  if (!stat || stat.state === 'Z' || stat.state === 'X') return null;
  return { pid, startTicks: stat.startTicks };
}

export async function isAlive(process: ProcessRef): Promise<boolean> {
  return (await readProcess(process.pid))?.startTicks === process.startTicks;
}

/** Sends SIGKILL if the pid still is this process. */
export async function killProcess({ pid, startTicks }: ProcessRef): Promise<void> {
  if (!(await isAlive({ pid, startTicks }))) return;
  try {
    process.kill(pid, 'SIGKILL');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ESRCH') throw error;
  }
}

const pollMs = 50;

/** Resolves with true when the process is gone, with false after the timeout. */
export async function waitUntilGone(
  process: ProcessRef,
  options: { timeoutMs?: number; signal?: AbortSignal } = {},
): Promise<boolean> {
  const deadline = performance.now() + (options.timeoutMs ?? Number.POSITIVE_INFINITY);
  while (await isAlive(process)) {
    if (performance.now() >= deadline) return false;
    // A watch without a signal must not keep the daemon from ending.
    if (options.signal) await delay(pollMs, options.signal);
    else await sleep(pollMs, undefined, { ref: options.timeoutMs !== undefined });
  }
  return true;
}

/**
 * The QEMU that runs the VM of this id, whoever started it: for a daemon that died between starting a QEMU and
 * writing down its pid.
 */
export async function findQemu(id: string): Promise<ProcessRef | null> {
  for (const entry of await readdir('/proc')) {
    if (!/^\d+$/.test(entry)) continue;
    const argv = await readFile(`/proc/${entry}/cmdline`, 'utf8').then(
      (text) => text.split('\0'),
      (): string[] => [],
    );
    const isQemu = argv[0]?.includes('qemu-system-') ?? false;
    const at = argv.indexOf('-uuid');
    if (isQemu && at >= 0 && argv[at + 1] === id) return readProcess(Number(entry));
  }
  return null;
}
