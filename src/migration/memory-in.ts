/** The destination QEMU: waits for disk and memory, and lets the VM run when it is told to. */
import { AppError } from '../model/errors.ts';
import {
  delay,
  type MigrationCapability,
  type MigrationStatus,
  type QmpConnection,
  type WaitOptions,
} from '../qmp/index.ts';
import { nodeNames } from '../vm/argv.ts';
import { exportName } from './mirror.ts';
import { WakeUps } from './wake-ups.ts';

const pollMs = 5;
const answerTimeoutMs = 1000;
const maxTimerMs = 2 ** 31 - 1;

const inCapabilities: MigrationCapability[] = [
  'events',
  'late-block-activate',
  'postcopy-ram',
  'return-path',
  'multifd',
];

/** QEMU serves its own disk over NBD, for the mirror of the source. */
export async function serveDisk(qmp: QmpConnection, socketPath: string): Promise<void> {
  await qmp.execute('nbd-server-start', {
    addr: { type: 'unix', data: { path: socketPath } },
    // Ten seconds by itself, which a cut of the link between its greeting and the answer may outlast. Only we get here.
    ...(qmp.version.major >= 10 && { 'handshake-max-seconds': 0 }),
  });
  await qmp.execute('block-export-add', {
    type: 'nbd',
    id: exportName,
    name: exportName,
    'node-name': nodeNames.disk,
    writable: true,
  });
}

/** The source is done with the disk: after this nobody but the VM writes to it. */
export async function closeDisk(qmp: QmpConnection, options: WaitOptions = {}): Promise<void> {
  await qmp.execute('nbd-server-stop', undefined, options).catch((error) => {
    // Stopped before, by a daemon that died right after.
    if (!(error instanceof AppError) || error.details.qmpClass === undefined) throw error;
  });
}

export async function listenForMemory(
  qmp: QmpConnection,
  options: { socketPath: string; postcopy: boolean; channels: number },
): Promise<void> {
  const { socketPath, postcopy, channels } = options;
  const on: MigrationCapability[] = [
    'events',
    // The disk is taken over when the VM runs, not when its state is there.
    'late-block-activate',
    ...(postcopy ? (['postcopy-ram', 'return-path'] as const) : []),
    ...(channels > 0 && !postcopy ? (['multifd'] as const) : []),
  ];
  await qmp.execute('migrate-set-capabilities', {
    capabilities: on.map((capability) => ({ capability, state: true })),
  });
  if (channels > 0 && !postcopy)
    await qmp.execute('migrate-set-parameters', { 'multifd-channels': channels });
  await qmp.execute('migrate-incoming', { uri: `unix:${socketPath}` });
}

/** Puts back what `listenForMemory` set, so that the VM can leave again in another mode. */
export async function stopListening(qmp: QmpConnection): Promise<void> {
  const capabilities = inCapabilities.map((capability) => ({ capability, state: false }));
  await qmp.execute('migrate-set-capabilities', { capabilities });
}

/**
 * Resolves when the VM's state is there and its vCPUs stand still: `complete` unless it is a post-copy, whose pages
 * come later. Throws `qemu_failed` when QEMU cannot load it, which ends QEMU.
 */
export async function waitUntilLoaded(
  qmp: QmpConnection,
  signal: AbortSignal,
): Promise<{ complete: boolean }> {
  using wakeUps = new WakeUps(qmp, ['MIGRATION']);
  for (;;) {
    const found = await lookAt(qmp, { signal });
    if (found.loaded) return { complete: found.complete };
    await wakeUps.rest(pollMs, signal);
  }
}

/** Resolves when no page is missing any more; `whilePaused` runs again and again while the stream of pages is lost. */
export async function waitUntilComplete(
  qmp: QmpConnection,
  options: { signal: AbortSignal; whilePaused: () => Promise<void> },
): Promise<void> {
  const { signal, whilePaused } = options;
  let told: MigrationStatus | undefined;
  const unsubscribe = qmp.onEvent((event) => {
    if (event.name === 'MIGRATION') told = event.data.status;
  });
  // A guest that waits for a page may hold up QEMU's main loop, and with it every answer, until the page is there. So
  // one question is asked at a time, and what QEMU tells by itself meanwhile counts as well.
  let asked: Promise<MigrationStatus | undefined> | undefined;
  try {
    for (;;) {
      asked ??= qmp
        .execute('query-migrate', undefined, { signal, timeoutMs: maxTimerMs })
        .then((info) => info.status);
      // What it ends with is seen when it is looked at next.
      asked.catch(() => {});
      const status = await Promise.race([asked, delay(answerTimeoutMs, signal)]);
      if (status !== undefined) asked = undefined;
      const now = status ?? told;
      if (now === 'completed') return;
      // One that was found so by a new daemon and says nothing may be paused, and held up by a page that nobody sends.
      if (now === 'postcopy-paused' || now === undefined) await whilePaused();
      await delay(20, signal);
    }
  } finally {
    unsubscribe();
  }
}

/** QEMU listens for a source that comes back with the missing pages. */
export async function listenForRecovery(qmp: QmpConnection, socketPath: string): Promise<void> {
  await qmp.executeOutOfBand('migrate-recover', { uri: `unix:${socketPath}` });
}

export interface Loading {
  loaded: boolean;
  complete: boolean;
  running: boolean;
}

export async function lookAt(qmp: QmpConnection, options: WaitOptions): Promise<Loading> {
  const { status, 'error-desc': output } = await qmp.execute('query-migrate', undefined, options);
  if (status === 'failed')
    throw new AppError('qemu_failed', `QEMU could not load the VM: ${output}`, { output });
  const complete = status === 'completed';
  const isPostcopy = status?.startsWith('postcopy-') ?? false;
  if (!complete && !isPostcopy) return { loaded: false, complete: false, running: false };
  // In post-copy the devices are loaded when QEMU leaves `inmigrate`.
  const { status: runState, running } = await qmp.execute('query-status', undefined, options);
  return { loaded: runState !== 'inmigrate', complete, running };
}
