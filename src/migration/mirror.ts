/**
 * The disk's way to the destination: QEMU mirrors it into an NBD client of its own, whose server is the destination's
 * QEMU behind a door of ours. `sync=top` takes only what the overlay holds; both sides have the image below it. Of a disk
 * that stands on no image here, and on one there, everything goes, also that a block is zero.
 *
 * The mirror runs in the background until it has caught up, or does not come nearer to it, and only then holds the
 * guest's writes until they are there too (`write-blocking`), so that it gets to an end which needs no catching up. QEMU
 * before 8.2 cannot change that while the job runs, so there it is so from the start.
 */
import { AppError } from '../model/errors.ts';
import type { BlockJobInfo, QmpConnection, QmpEvent } from '../qmp/index.ts';
import { nodeNames } from '../vm/argv.ts';
import { type MirrorProgress, StallWatch } from './mirror-policy.ts';
import { WakeUps } from './wake-ups.ts';

export const mirrorJob = 'migrate-disk';
export const targetNode = 'migrate-disk-target';
export const exportName = 'disk';
/** How often progress is looked at; that it is ready or at its end QEMU tells by itself. */
const pollMs = 100;
const endPollMs = 10;

/** The last word of a job is that it is gone (`JOB_STATUS_CHANGE` to `null`). */
const jobEvents: QmpEvent['name'][] = ['BLOCK_JOB_READY', 'JOB_STATUS_CHANGE'];
/** The guest stands still while QEMU and the server greet each other, some round trips long: no longer than this. */
const greetingTimeoutMs = 4000;

/** Throws `timeout` while QEMU still waits for the server, which ends when its socket does. */
export async function startMirror(
  qmp: QmpConnection,
  options: { socketPath: string; speedBytesPerSecond: number; wholeDisk?: boolean; signal?: AbortSignal },
): Promise<void> {
  await qmp.execute(
    'blockdev-add',
    {
      driver: 'nbd',
      'node-name': targetNode,
      server: { type: 'unix', path: options.socketPath },
      export: exportName,
      discard: 'unmap',
      'detect-zeroes': 'unmap',
    },
    { timeoutMs: greetingTimeoutMs, ...(options.signal ? { signal: options.signal } : {}) },
  );
  await qmp.execute('blockdev-mirror', {
    'job-id': mirrorJob,
    device: nodeNames.disk,
    target: targetNode,
    sync: options.wholeDisk ? 'full' : 'top',
    speed: options.speedBytesPerSecond,
    'copy-mode': canChangeMode(qmp) ? 'background' : 'write-blocking',
  });
}

/** Resolves when the mirror has caught up, and from then on stays so. Throws `qemu_failed` if it ended instead. */
export async function waitUntilMirrored(
  qmp: QmpConnection,
  options: { signal: AbortSignal; onProgress: (progress: MirrorProgress) => void },
): Promise<void> {
  const { signal, onProgress } = options;
  using wakeUps = new WakeUps(qmp, jobEvents);
  const stalls = new StallWatch();
  let holdsWrites = !canChangeMode(qmp);
  for (;;) {
    const job = await findJob(qmp);
    if (!job) throw new AppError('qemu_failed', 'The mirror of the disk ended before it had caught up');
    const progress = { doneBytes: job.offset, totalBytes: job.len };
    onProgress(progress);
    if (!holdsWrites && (job.ready || stalls.hasStalled(progress))) {
      await qmp.execute('block-job-change', {
        id: mirrorJob,
        type: 'mirror',
        'copy-mode': 'write-blocking',
      });
      holdsWrites = true;
    }
    if (job.ready) return;
    await wakeUps.rest(pollMs, signal);
  }
}

/** While the VM stands still: the last write is there, and QEMU lets go of the destination. */
export async function finishMirror(qmp: QmpConnection, signal: AbortSignal): Promise<void> {
  let failure: string | undefined;
  const unsubscribe = qmp.onEvent((event) => {
    if (event.name === 'BLOCK_JOB_COMPLETED' && event.data.device === mirrorJob) failure = event.data.error;
    if (event.name === 'BLOCK_JOB_ERROR' && event.data.device === mirrorJob) failure ??= 'an I/O error';
  });
  try {
    // Of a mirror that is ready, this is the orderly end: the copy is consistent as of now.
    await qmp.execute('block-job-cancel', { device: mirrorJob });
    await waitUntilJobGone(qmp, signal);
  } finally {
    unsubscribe();
  }
  if (failure !== undefined)
    throw new AppError('qemu_failed', `The mirror of the disk failed at its end: ${failure}`);
  await qmp.execute('blockdev-del', { 'node-name': targetNode });
}

/** Whatever there is of a mirror goes, also one of an earlier daemon. The disk of the VM is as it was. */
export async function dropMirror(qmp: QmpConnection, signal: AbortSignal): Promise<void> {
  if (await findJob(qmp)) {
    // It may end by itself in between.
    await qmp.execute('block-job-cancel', { device: mirrorJob, force: true }).catch(() => {});
    await waitUntilJobGone(qmp, signal);
  }
  const nodes = await qmp.execute('query-named-block-nodes', { flat: true });
  if (nodes.some((node) => node['node-name'] === targetNode))
    await qmp.execute('blockdev-del', { 'node-name': targetNode });
}

export async function setMirrorSpeed(qmp: QmpConnection, bytesPerSecond: number): Promise<void> {
  if (await findJob(qmp))
    await qmp.execute('block-job-set-speed', { device: mirrorJob, speed: bytesPerSecond });
}

async function findJob(qmp: QmpConnection): Promise<BlockJobInfo | undefined> {
  const jobs = await qmp.execute('query-block-jobs');
  return jobs.find(({ device }) => device === mirrorJob);
}

async function waitUntilJobGone(qmp: QmpConnection, signal: AbortSignal): Promise<void> {
  using wakeUps = new WakeUps(qmp, jobEvents);
  while (await findJob(qmp)) await wakeUps.rest(endPollMs, signal);
}

function canChangeMode(qmp: QmpConnection): boolean {
  const { major, minor } = qmp.version;
  return major > 8 || (major === 8 && minor >= 2);
}
