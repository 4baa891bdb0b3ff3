/**
 * A copy of a running VM's disk as of one moment, into a qcow2 overlay on the same image: only what the VM has
 * written itself is copied. Nothing of it is left in QEMU afterwards, however it ends.
 */
import { randomUUID } from 'node:crypto';
import { AppError } from '../model/errors.ts';
import { KiB } from '../model/units.ts';
import { abortError, delay, type JobInfo, type QmpConnection, withDeadline } from '../qmp/index.ts';
import { nodeNames } from './argv.ts';
import type { Machine } from './machine.ts';

const pollMs = 50;
/**
 * While the VM is stopped the copy only guards the disk: its reading and writing in QEMU's main loop would make the
 * VM's pause ten times as long. It goes on when the VM runs, or after this time.
 */
const heldBackMs = 1_000;
const heldBackBytesPerSecond = 64 * KiB;

export interface DiskBackup {
  /** Resolves when the copy is whole and QEMU has closed it; rejects when it failed or was cancelled. */
  done: Promise<void>;
  /** Ends the copy and waits until QEMU has let go of the file; it never rejects. */
  cancel(): Promise<void>;
}

/**
 * Starts the copy; the moment is when this resolves, or, for a VM that is stopped, the moment of its stop.
 * `targetFile` is a qcow2 made by the caller, of the same size and with the same backing image as the VM's disk.
 */
export async function backupDisk(
  machine: Machine,
  options: { targetFile: string; node?: string },
): Promise<DiskBackup> {
  const { targetFile, node = nodeNames.disk } = options;
  const { qmp } = machine;
  const { running } = await machine.status();
  const job = `backup-${randomUUID()}`;
  // Node names have at most 31 characters.
  const target = `b-${job.slice(-12)}`;
  await qmp.execute('blockdev-add', {
    driver: 'qcow2',
    'node-name': target,
    file: { driver: 'file', filename: targetFile, discard: 'unmap' },
    discard: 'unmap',
    'detect-zeroes': 'unmap',
  });
  try {
    await qmp.execute('blockdev-backup', {
      'job-id': job,
      device: node,
      target,
      sync: 'top',
      speed: running ? 0 : heldBackBytesPerSecond,
      // The job stays until it was looked at, so its error is not lost.
      'auto-dismiss': false,
    });
  } catch (error) {
    await removeNode(qmp, target);
    throw error;
  }
  const unleash = running ? () => {} : unleashLater(machine, job);
  const cancelled = new AbortController();
  const done = finish(qmp, job, target, cancelled.signal).finally(unleash);
  done.catch(() => {});
  return {
    done,
    cancel: async () => {
      cancelled.abort();
      await done.catch(() => {});
    },
  };
}

/** Gives the job full speed as soon as the VM runs; the answer stops waiting for that. */
function unleashLater(machine: Machine, job: string): () => void {
  const unleash = (): void => {
    forget();
    machine.qmp.execute('block-job-set-speed', { device: job, speed: 0 }).catch(() => {
      // It may have ended already.
    });
  };
  const timer = setTimeout(unleash, heldBackMs);
  const unsubscribe = machine.onStatus(({ running }) => {
    if (running) unleash();
  });
  const forget = (): void => {
    clearTimeout(timer);
    unsubscribe();
  };
  return forget;
}

async function finish(qmp: QmpConnection, job: string, target: string, signal: AbortSignal): Promise<void> {
  let cancelSent = false;
  try {
    for (;;) {
      const info = await findJob(qmp, job);
      if (info.status === 'concluded') {
        await qmp.execute('job-dismiss', { id: job });
        if (signal.aborted) throw abortError(signal);
        if (info.error !== undefined) throw failed(info.error);
        return;
      }
      if (signal.aborted && !cancelSent) {
        cancelSent = true;
        // It may have concluded in between, which the next round sees.
        await qmp.execute('job-cancel', { id: job }).catch(() => {});
      }
      await pause(qmp, cancelSent ? undefined : signal);
    }
  } finally {
    await removeNode(qmp, target);
  }
}

async function findJob(qmp: QmpConnection, job: string): Promise<JobInfo> {
  const info = (await qmp.execute('query-jobs')).find(({ id }) => id === job);
  if (!info) throw failed('the job is not there any more');
  return info;
}

/** Rests until the job changes, at most for a poll; an abort ends the rest. */
async function pause(qmp: QmpConnection, signal: AbortSignal | undefined): Promise<void> {
  const changed = qmp.waitForEvent('JOB_STATUS_CHANGE', ({ status }) => status === 'concluded', {
    timeoutMs: pollMs,
    signal,
  });
  await changed.catch(() => {});
}

/** A node that a job has just left may still be in use for a moment. */
async function removeNode(qmp: QmpConnection, node: string): Promise<void> {
  const remove = async (): Promise<void> => {
    for (;;) {
      try {
        await qmp.execute('blockdev-del', { 'node-name': node });
        return;
      } catch (error) {
        if (!(error instanceof AppError) || !/in use|busy/i.test(error.message)) return;
        await delay(pollMs);
      }
    }
  };
  await withDeadline(remove(), {
    timeoutMs: 10_000,
    onTimeout: () => new AppError('timeout', `QEMU did not let go of the copy of the disk (node ${node})`),
  });
}

const failed = (output: string): AppError =>
  new AppError('qemu_failed', `QEMU could not copy the disk of the VM: ${output}`, { output });
