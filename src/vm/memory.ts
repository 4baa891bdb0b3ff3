/**
 * The memory and device state of a running VM, captured at one moment into a stream, and loaded into a QEMU that
 * waits for it. The VM that is captured goes on: its disks stay its own and its pause does not grow with its RAM.
 *
 * How a capture goes, and why in this order:
 *
 *   stop                    the moment that disk and memory are taken at
 *   whenStopped()           the caller starts the copy of the disk as of this moment
 *   migrate                 with `background-snapshot`: QEMU write-protects the RAM (userfaultfd), saves the
 *                           devices, and from then on saves a page before the guest may write to it
 *   first page is counted   only now the moment is captured: at status 'active' QEMU has yet to stop the VM itself,
 *                           and a VM that runs again before that would be captured later than its disk
 *   cont                    if it ran before; the rest of the RAM goes out while it runs
 *
 * A plain migration to a file would inactivate the disks of the VM and pause it for all of its RAM.
 */
import { AppError } from '../model/errors.ts';
import type { VmExit } from '../model/vm.ts';
import {
  abortError,
  delay,
  type MigrationCapability,
  type MigrationInfo,
  type QemuVersion,
  type QmpConnection,
  withDeadline,
} from '../qmp/index.ts';
import type { Machine } from './machine.ts';

const captureTimeoutMs = 30 * 60_000;
/** QEMU's own default of 128 MiB/s is for networks; here both ends are on one host. */
const unlimitedBytesPerSecond = 10 ** 12;
const pollMs = 2;
const slowPollMs = 50;
const cancelTimeoutMs = 30_000;

export interface CaptureOptions {
  /**
   * A unix socket where somebody listens for the stream: a file's pipe or the QEMU of a clone. With QEMU before 8.1
   * it must be read to its end, whatever happens: one that goes away can hang the VM that is captured.
   */
  socketPath: string;
  /** Runs while the VM is stopped, at the captured moment. It must be short. */
  whenStopped: () => Promise<void>;
  signal?: AbortSignal;
  timeoutMs?: number;
}

export interface Captured {
  /** How long the VM did not run; 0 if it did not run before. */
  pauseMs: number;
  /** From the stop to the last page. */
  totalMs: number;
}

/**
 * Captures the memory. On failure or abort the VM is as it was before, running or paused, and nothing of the
 * capture is left in QEMU; what `whenStopped` began is the caller's to undo.
 */
export async function captureMemory(machine: Machine, options: CaptureOptions): Promise<Captured> {
  const { socketPath, whenStopped, signal, timeoutMs = captureTimeoutMs } = options;
  const { qmp } = machine;
  const { running: wasRunning } = await machine.status();
  await using undo = new AsyncDisposableStack();
  await setUp(qmp, 'background-snapshot', undo);

  const startedAt = performance.now();
  let pauseMs = 0;
  if (wasRunning) {
    undo.defer(
      asFarAsPossible(async () => {
        if (pauseMs === 0) await machine.resume();
      }),
    );
    await machine.pause();
  }
  const stoppedAt = performance.now();
  await whenStopped();
  if (signal?.aborted) throw abortError(signal);
  const cut = () => cutStream(qmp);
  undo.defer(
    asFarAsPossible(async () => {
      await cut();
      await endMigration(qmp, timeoutMs);
    }),
  );
  signal?.addEventListener('abort', cut, { once: true });
  undo.defer(() => signal?.removeEventListener('abort', cut));
  await qmp.execute('migrate', { uri: `unix:${socketPath}` });
  await pollMigration(qmp, isCaptured, { pollMs, timeoutMs, signal });
  const { running } = await machine.status();
  if (wasRunning) {
    await machine.resume();
    pauseMs = performance.now() - stoppedAt;
  } else if (running) {
    // QEMU 7.2 starts the VM at this point, whatever it did before.
    await machine.pause();
  }
  await pollMigration(qmp, (info) => info.status === 'completed', { pollMs: slowPollMs, timeoutMs, signal });
  return { pauseMs, totalMs: performance.now() - startedAt };
}

/** Pages are saved only after the devices are, and after QEMU's own order to go on was given. */
const isCaptured = ({ status, ram }: MigrationInfo): boolean =>
  status === 'completed' || (status === 'active' && ram !== undefined && ram.duplicate + ram.normal > 0);

/** A QEMU that listens for memory, and the promise of what becomes of it. */
export interface Incoming {
  socketPath: string;
  /** Resolves when the VM is loaded and paused; a QEMU that cannot load ends itself, and this rejects. */
  loaded: Promise<void>;
}

/**
 * Lets a machine that was launched with `incoming` listen for memory. The loaded VM stays paused, but QEMU announces
 * its addresses on the network at once. Where these are still another VM's, cut its cables first (`setLinks`).
 * (`announce-rounds` 0 is no way around: QEMU then crashes at the next reset of the interface, seen in 10.0.)
 */
export async function listenForMemory(
  machine: Machine,
  options: { signal?: AbortSignal; timeoutMs?: number } = {},
): Promise<Incoming> {
  const { signal, timeoutMs = captureTimeoutMs } = options;
  const { qmp } = machine;
  const socketPath = machine.paths.incoming;
  await qmp.execute('migrate-incoming', { uri: `unix:${socketPath}` });
  const completed = pollMigration(qmp, (info) => info.status === 'completed', {
    pollMs: 10,
    timeoutMs,
    signal,
  });
  const ended = machine.exited.then((exit) => Promise.reject(cannotLoad(exit)));
  const onTimeout = () => new AppError('timeout', 'unreachable: the poll has its own timeout');
  const loaded = withDeadline(Promise.race([firstUnlessQemuDied(completed, ended), ended]), {
    signal,
    onTimeout,
  });
  // The caller may still be busy with the other end.
  loaded.catch(() => {});
  return { socketPath, loaded };
}

/** A poll that fails because QEMU died must not hide why it died. */
async function firstUnlessQemuDied(completed: Promise<unknown>, ended: Promise<never>): Promise<void> {
  try {
    await completed;
  } catch (error) {
    const isLost = error instanceof AppError && error.code === 'qemu_failed';
    if (!isLost) throw error;
    await withDeadline(ended, { timeoutMs: cancelTimeoutMs, onTimeout: () => error });
  }
}

const cannotLoad = (exit: VmExit): AppError =>
  new AppError('qemu_failed', `QEMU could not load the memory of the VM: ${exit.detail}`, {
    output: exit.detail,
  });

/** Turns on one capability and full speed, and defers what puts both back. */
async function setUp(
  qmp: QmpConnection,
  capability: MigrationCapability,
  undo: AsyncDisposableStack,
): Promise<void> {
  const set = (state: boolean) =>
    qmp.execute('migrate-set-capabilities', { capabilities: [{ capability, state }] });
  const before = await qmp.execute('query-migrate-parameters');
  undo.defer(
    asFarAsPossible(async () => {
      await set(false);
      await qmp.execute('migrate-set-parameters', { 'max-bandwidth': before['max-bandwidth'] });
    }),
  );
  try {
    await set(true);
  } catch (error) {
    if (!(error instanceof AppError) || error.details.qmpClass === undefined) throw error;
    throw new AppError(
      'unsupported',
      `This host cannot capture the memory of a running VM: ${error.details.output}; wanted userfaultfd with ` +
        'write protection (root, or the sysctl vm.unprivileged_userfaultfd=1)',
      { missing: 'userfaultfd write protection' },
      { cause: error },
    );
  }
  await qmp.execute('migrate-set-parameters', { 'max-bandwidth': unlimitedBytesPerSecond });
}

/** A step back. A QEMU that has died needs none, and the first error is the one to tell. */
const asFarAsPossible = (step: () => Promise<void>) => () => step().catch(() => {});

const isOver = (info: MigrationInfo): boolean =>
  info.status === undefined || ['none', 'completed', 'failed', 'cancelled'].includes(info.status);

/**
 * QEMU before 8.1 forgets, when a background snapshot fails or is cancelled, that pages are still write-protected:
 * then the VM, or QEMU itself, waits for ever at its next write.
 */
const canCancel = ({ major, minor }: QemuVersion): boolean => major > 8 || (major === 8 && minor >= 1);

/**
 * While nobody reads the stream, a page that is not saved yet holds up who writes it, QEMU's main loop too, which then
 * answers nothing. So the stream is cut past it; where none is open QEMU says so, and that is as good.
 */
async function cutStream(qmp: QmpConnection): Promise<void> {
  if (!canCancel(qmp.version)) return;
  const instances = [{ type: 'migration' as const }];
  await qmp.executeOutOfBand('yank', { instances }, { timeoutMs: cancelTimeoutMs }).catch(() => {});
}

/** Ends a migration if one is under way, and waits until QEMU has let go of it. */
async function endMigration(qmp: QmpConnection, timeoutMs: number): Promise<void> {
  if (isOver(await qmp.execute('query-migrate'))) return;
  if (canCancel(qmp.version)) await qmp.execute('migrate_cancel');
  const deadline = performance.now() + (canCancel(qmp.version) ? cancelTimeoutMs : timeoutMs);
  while (!isOver(await qmp.execute('query-migrate')) && performance.now() < deadline) await delay(pollMs);
}

/** Asks until `isDone`; a migration that failed is an error with QEMU's words. */
async function pollMigration(
  qmp: QmpConnection,
  isDone: (info: MigrationInfo) => boolean,
  options: { pollMs: number; timeoutMs: number; signal?: AbortSignal },
): Promise<void> {
  const deadline = performance.now() + options.timeoutMs;
  for (;;) {
    const info = await qmp.execute('query-migrate', undefined, { signal: options.signal });
    if (isDone(info)) return;
    if (info.status === 'failed' || info.status === 'cancelled') {
      const output = info['error-desc'] ?? `migration ${info.status}`;
      throw new AppError('qemu_failed', `QEMU could not move the memory of the VM: ${output}`, { output });
    }
    if (performance.now() > deadline) {
      throw new AppError('timeout', `The memory of the VM did not move within ${options.timeoutMs} ms`, {
        waitedFor: 'memory',
        timeoutMs: options.timeoutMs,
      });
    }
    await delay(options.pollMs, options.signal);
  }
}
