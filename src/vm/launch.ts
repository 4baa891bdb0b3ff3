/**
 * Starts a QEMU that outlives us: its own session, no pipe to us, its output in a file. It resolves when the
 * monitor answers, with the VM paused; if that does not come to pass, nothing of the attempt is left.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { open, rm } from 'node:fs/promises';
import { AppError } from '../model/errors.ts';
import type { ProcessRef } from '../model/vm.ts';
import { abortError, delay, QmpConnection, withDeadline } from '../qmp/index.ts';
import { type Launch, qemuArgv } from './argv.ts';
import { checkSocketPaths, type MachinePaths, machinePaths, pipePaths, socketPaths } from './paths.ts';
import { readProcess } from './process.ts';
import { SpareMonitor } from './spare-monitor.ts';
import { readLastLines } from './tail.ts';

const startTimeoutMs = 30_000;
const connectPauseMs = 20;

export interface LaunchOptions {
  signal?: AbortSignal;
  /** The program; found on PATH if it has no slash. */
  qemu?: string;
  timeoutMs?: number;
}

export interface Launched {
  process: ProcessRef;
  qmp: QmpConnection;
  spareMonitor: SpareMonitor | undefined;
  /** How it ended: 'exit code 1', 'signal SIGKILL'. It never rejects. */
  ended: Promise<string>;
}

export async function launchQemu(launch: Launch, options: LaunchOptions = {}): Promise<Launched> {
  const { signal, qemu = 'qemu-system-x86_64', timeoutMs = startTimeoutMs } = options;
  const paths = machinePaths(launch.directory);
  checkSocketPaths(paths);
  if (signal?.aborted) throw abortError(signal);
  await using undo = new AsyncDisposableStack();
  await removeSockets(paths);
  undo.defer(() => removeSockets(paths));

  if (launch.spareMonitor) await SpareMonitor.makePipes(paths, signal ?? AbortSignal.timeout(timeoutMs));

  const { child, ended } = await spawnDetached(qemu, qemuArgv(launch), paths);
  undo.defer(async () => {
    // It is our child and not reaped yet, so its pid is still its own.
    child.kill('SIGKILL');
    await ended;
  });

  const work = new AbortController();
  const failed = ended.then(async (how) => {
    const output = await readLastLines(paths.qemuLog);
    throw new AppError('qemu_failed', `QEMU ended while it started (${how}): ${lastLine(output)}`, {
      output,
    });
  });
  const onTimeout = () =>
    new AppError('timeout', `QEMU's monitor did not answer within ${timeoutMs} ms of its start`, {
      waitedFor: 'qmp',
      timeoutMs,
    });
  try {
    const connected = connectWhenReady(paths.qmp, work.signal);
    const qmp = await withDeadline(Promise.race([connected, failed]), { timeoutMs, signal, onTimeout });
    undo.defer(() => qmp.close());
    const spareMonitor = SpareMonitor.open(paths);
    undo.defer(() => spareMonitor?.[Symbol.dispose]());
    await spareMonitor?.negotiate();
    const process = await readProcess(child.pid!);
    if (!process) await failed;
    undo.move();
    return { process: process!, qmp, spareMonitor, ended };
  } finally {
    work.abort();
  }
}

/** Sockets and pipes of an earlier run name nobody any more. */
export async function removeSockets(paths: MachinePaths): Promise<void> {
  for (const path of [...socketPaths(paths), ...pipePaths(paths)]) await rm(path, { force: true });
}

async function spawnDetached(
  qemu: string,
  argv: string[],
  paths: MachinePaths,
): Promise<{ child: ChildProcess; ended: Promise<string> }> {
  const log = await open(paths.qemuLog, 'w', 0o600);
  try {
    const child = spawn(qemu, argv, {
      detached: true,
      stdio: ['ignore', log.fd, log.fd],
      cwd: '/',
      // The daemon's own environment may hold secrets.
      env: { PATH: process.env.PATH, LC_ALL: 'C' },
    });
    // Listened to from the first moment: it may end before the log is closed.
    const ended = endOf(child);
    await once(child, 'spawn');
    child.unref();
    return { child, ended };
  } catch (error) {
    throw new AppError(
      'qemu_failed',
      `Cannot start ${qemu}: ${(error as Error).message}`,
      {},
      { cause: error },
    );
  } finally {
    await log.close();
  }
}

function endOf(child: ChildProcess): Promise<string> {
  const { promise, resolve } = Promise.withResolvers<string>();
  child.once('exit', (code, signal) => resolve(signal ? `signal ${signal}` : `exit code ${code}`));
  return promise;
}

/** The socket appears some time after the start, so a failure to connect means nothing yet. */
async function connectWhenReady(path: string, signal: AbortSignal): Promise<QmpConnection> {
  for (;;) {
    try {
      return await QmpConnection.connect(path, { signal });
    } catch {
      await delay(connectPauseMs, signal);
    }
  }
}

const lastLine = (text: string): string => text.slice(text.lastIndexOf('\n') + 1);
