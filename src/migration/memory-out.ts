/**
 * The memory's way out of the source QEMU, up to the moment at which the VM may be released.
 *
 *   migrate ... rounds ... [stop, migrate-start-postcopy] ... pre-switchover: VM paused
 *   whenPaused()      the disk's mirror ends
 *   pre-copy:         migrate-continue, QEMU completes    -> releasable: QEMU can no longer resume the VM by itself
 *   post-copy:        -> releasable, since the VM was stopped by us; `letGo` continues when the destination has the
 *                     commit, and until then QEMU can still be taken back
 *
 * A pre-copy has no return path: it completes when the last byte is in our door, with no round trip.
 */
import { AppError } from '../model/errors.ts';
import type { MigrationLimits, MigrationMode } from '../model/migration.ts';
import {
  delay,
  type MigrationCapability,
  type MigrationInfo,
  type MigrationStatus,
  type QmpConnection,
} from '../qmp/index.ts';
import {
  isTimeForPostcopy,
  nearlyNothingBytes,
  pauseMs,
  type Round,
  switchoverBytes,
} from './memory-policy.ts';
import { WakeUps } from './wake-ups.ts';

/** How often progress is looked at; whatever else happens QEMU tells by itself. */
const pollMs = 100;
const urgentPollMs = 10;
const settlePollMs = 10;
/** QEMU's own default of 128 MiB/s is for networks of another time; the link has its own limit. */
export const unlimitedBytesPerSecond = 10 ** 12;
const defaultBytesPerSecond = 128 * 1024 * 1024;
const defaultDowntimeMs = 300;
/** Where the speed of the link is not known after the first round. */
const unknownSwitchoverBytes = 1024 * 1024;
/** QEMU's own (since 2.5). The other keeps a capability, which cannot be changed on the way, as good as off. */
const fullThrottle = { 'cpu-throttle-initial': 20, 'max-cpu-throttle': 99 };
const noThrottle = { 'cpu-throttle-initial': 1, 'max-cpu-throttle': 1 };

const ourCapabilities: MigrationCapability[] = [
  'events',
  'pause-before-switchover',
  'auto-converge',
  'postcopy-ram',
  'return-path',
  'multifd',
];

export interface MemoryOutOptions {
  socketPath: string;
  mode: MigrationMode;
  /** The present ones: they may change at any time. */
  limits: () => MigrationLimits;
  channels: number;
  signal: AbortSignal;
  onInfo: (info: MigrationInfo) => void;
  /** An agent reads QEMU's stream, and knows better than QEMU what becomes of it. */
  agent?: MemoryAgent;
  /** Runs while the VM stands still, before the last state goes out. */
  whenPaused: () => Promise<void>;
}

export interface MemoryAgent {
  /**
   * Post-copy without QEMU's doing: called when it is time for it, after which QEMU is to complete as pre-copy soon.
   * Without an agent QEMU does the post-copy.
   */
  drain(): void;
  noteRound(round: number, remainingBytes: number): void;
  /** It has drained for long enough to know what the VM writes all the time, and all that it sent before is over the link. */
  readonly isSampled: boolean;
  /** The destination has not taken the first round yet. */
  readonly isBehind: boolean;
  /** Bytes of changed memory that get over in a second; `undefined` while nobody knows. */
  readonly changesPerSecond: number | undefined;
}

/** Resolves when the VM may be released. What it leaves on failure, `dropMemoryOut` takes away. */
export async function sendMemory(
  qmp: QmpConnection,
  options: MemoryOutOptions,
): Promise<{ stoppedByUs: boolean }> {
  const { mode, signal, onInfo, whenPaused } = options;
  await prepare(qmp, options);
  using wakeUps = new WakeUps(qmp, ['MIGRATION', 'MIGRATION_PASS']);
  await qmp.execute('migrate', { uri: `unix:${options.socketPath}` }, { signal });
  const rounds: Round[] = [];
  let draining: { bytes: number; sampledAtMs?: number } | undefined;
  let stoppedByUs = false;
  let isContinued = false;
  let isPaced = true;
  for (;;) {
    const info = await qmp.execute('query-migrate', undefined, { signal });
    onInfo(info);
    throwIfOver(info);
    if (noteRound(rounds, info, options.agent)) isPaced = false;
    if (!draining && !isPaced) isPaced = await setPace(qmp, rounds, options);
    if (info.status === 'pre-switchover' && !isContinued) {
      await whenPaused();
      if (stoppedByUs) return { stoppedByUs };
      await qmp.execute('migrate-continue', { state: 'pre-switchover' }, { signal });
      isContinued = true;
    }
    if (info.status === 'completed') return { stoppedByUs };
    if (draining && options.agent) {
      if (options.agent.isSampled) draining.sampledAtMs ??= performance.now();
      const { sampledAtMs } = draining;
      const size = switchoverBytes(sampledAtMs === undefined ? undefined : performance.now() - sampledAtMs);
      if (size !== draining.bytes) await setSwitchoverSize(qmp, size, options.limits().downtimeMs);
      draining.bytes = size;
    } else if (info.status === 'active' && options.agent && isTimeForPostcopy(mode, rounds)) {
      await setSwitchoverSize(qmp, nearlyNothingBytes, options.limits().downtimeMs);
      draining = { bytes: nearlyNothingBytes };
      options.agent.drain();
    } else if (info.status === 'active' && !stoppedByUs && isTimeForPostcopy(mode, rounds)) {
      // QEMU would let the VM run again if the switch to post-copy failed; a VM that we stopped it leaves alone.
      await qmp.execute('stop', undefined, { signal });
      stoppedByUs = true;
      await qmp.execute('migrate-start-postcopy', undefined, { signal });
    }
    const isUrgent = isContinued || stoppedByUs || !isPaced;
    await wakeUps.rest(isUrgent ? urgentPollMs : pollMs, signal);
  }
}

/** After the commit: the last state of a post-copy goes out. */
export async function letGo(qmp: QmpConnection): Promise<void> {
  const { status } = await qmp.execute('query-migrate');
  if (status === 'pre-switchover') await qmp.execute('migrate-continue', { state: 'pre-switchover' });
}

/** Sends what is missing at the destination through a new socket; a stream that is only half dead is given up. */
export async function resumePostcopy(
  qmp: QmpConnection,
  options: { socketPath: string; signal: AbortSignal },
): Promise<void> {
  const { socketPath, signal } = options;
  for (;;) {
    const { status } = await qmp.execute('query-migrate', undefined, { signal });
    if (status === 'postcopy-paused') break;
    if (!status?.startsWith('postcopy-')) return;
    // It may notice the loss by itself in between.
    await qmp.execute('migrate-pause', undefined, { signal }).catch(() => {});
    await delay(20, signal);
  }
  await qmp.execute('migrate', { uri: `unix:${socketPath}`, resume: true }, { signal });
}

/**
 * Whether QEMU is in a post-copy, of which it never lets go: neither a cancel nor `cont` is taken (seen on 10.0.2). Its
 * stream has been closed before. One that was just let go takes a moment to begin, and then either fails at the closed
 * stream before it is bound or pauses because of it, so it is asked until its answer stands. An abort says that it is
 * bound: it has left every state in which it could be taken back.
 */
export async function isBoundToPostcopy(
  qmp: QmpConnection,
  options: { wasLetGo: boolean; signal: AbortSignal },
): Promise<boolean> {
  for (;;) {
    const { status } = await qmp.execute('query-migrate');
    const isUnderWay =
      status === 'device' ||
      status === 'postcopy-active' ||
      (status === 'pre-switchover' && options.wasLetGo);
    if (!isUnderWay) return status?.startsWith('postcopy-') ?? false;
    if (options.signal.aborted) return true;
    await delay(settlePollMs);
  }
}

/** New limits for a migration at work. */
export async function setLimits(qmp: QmpConnection, limits: MigrationLimits): Promise<void> {
  const { downtimeMs, bandwidthBps, autoConverge } = limits;
  const bytesPerSecond =
    bandwidthBps === undefined ? unlimitedBytesPerSecond : Math.max(1, Math.floor(bandwidthBps / 8));
  await qmp.execute('migrate-set-parameters', {
    'downtime-limit': downtimeMs,
    'max-bandwidth': bytesPerSecond,
    'max-postcopy-bandwidth': bandwidthBps === undefined ? 0 : bytesPerSecond,
    ...(autoConverge ? fullThrottle : noThrottle),
  });
}

/** Ends a migration, whoever began it, and puts QEMU's settings back. The VM is left paused or running. */
export async function dropMemoryOut(qmp: QmpConnection, signal: AbortSignal): Promise<void> {
  for (;;) {
    const { status } = await qmp.execute('query-migrate', undefined, { signal });
    if (isAtRest(status)) break;
    if (status !== 'cancelling') await qmp.execute('migrate_cancel', undefined, { signal });
    await delay(2, signal);
  }
  // It says that it is over a moment before it lets go of the VM, which it would not let run until then.
  while ((await qmp.execute('query-status', undefined, { signal })).status === 'finish-migrate')
    await delay(2, signal);
  await setCapabilities(qmp, []);
  await qmp.execute('migrate-set-parameters', {
    'downtime-limit': defaultDowntimeMs,
    'max-bandwidth': defaultBytesPerSecond,
    'max-postcopy-bandwidth': 0,
    ...fullThrottle,
  });
  await setSwitchoverSize(qmp, 0, defaultDowntimeMs);
}

async function prepare(qmp: QmpConnection, options: MemoryOutOptions): Promise<void> {
  const { mode, channels } = options;
  const hasPostcopy = mode !== 'precopy' && !options.agent;
  await setCapabilities(qmp, [
    'events',
    'pause-before-switchover',
    // Whether it is wanted may change on the way; see `noThrottle`.
    'auto-converge',
    ...(hasPostcopy ? (['postcopy-ram', 'return-path'] as const) : []),
    ...(channels > 0 && !hasPostcopy ? (['multifd'] as const) : []),
  ]);
  if (channels > 0 && !hasPostcopy)
    await qmp.execute('migrate-set-parameters', { 'multifd-channels': channels });
  await setLimits(qmp, options.limits());
  // Much of the first round may still be on its way when QEMU has got rid of it, and the VM would stand still for that.
  if (options.agent) await setSwitchoverSize(qmp, nearlyNothingBytes, options.limits().downtimeMs);
}

/**
 * QEMU takes what it writes to be what the link carries, and would stop the VM with as much left as that carries in the
 * longest pause. What our agent makes of it is another matter, so it is told how much it may be. False while it is too early.
 */
async function setPace(
  qmp: QmpConnection,
  rounds: readonly Round[],
  { agent, mode, limits }: MemoryOutOptions,
): Promise<boolean> {
  if (!agent || (rounds.at(-1)?.number ?? 0) < 2) return true;
  if (agent.isBehind) return false;
  const { downtimeMs } = limits();
  const { changesPerSecond: speed } = agent;
  const bytes =
    speed === undefined ? unknownSwitchoverBytes : (speed * pauseMs(mode, rounds, downtimeMs)) / 1000;
  await setSwitchoverSize(qmp, bytes, downtimeMs);
  return true;
}

/** With so many bytes left or less, QEMU stops the VM. 0: as it thinks best itself. QEMU before 8.2 always does that. */
async function setSwitchoverSize(qmp: QmpConnection, bytes: number, downtimeMs: number): Promise<void> {
  const speed = bytes === 0 ? 0 : Math.max(1, Math.ceil((bytes * 1000) / downtimeMs));
  await qmp.execute('migrate-set-parameters', { 'avail-switchover-bandwidth': speed }).catch((error) => {
    if (!(error instanceof AppError) || error.details.qmpClass === undefined) throw error;
  });
}

async function setCapabilities(qmp: QmpConnection, on: readonly MigrationCapability[]): Promise<void> {
  const capabilities = ourCapabilities.map((capability) => ({ capability, state: on.includes(capability) }));
  await qmp.execute('migrate-set-capabilities', { capabilities });
}

/** Whether another one has begun. */
function noteRound(rounds: Round[], { ram }: MigrationInfo, agent: MemoryAgent | undefined): boolean {
  const number = ram?.['dirty-sync-count'] ?? 0;
  if (!ram || number <= (rounds.at(-1)?.number ?? 0)) return false;
  const remainingBytes = ram.remaining;
  agent?.noteRound(number, remainingBytes);
  const speed = agent?.changesPerSecond;
  const forecast = speed === undefined ? {} : { forecastMs: (remainingBytes * 1000) / speed };
  rounds.push({ number, remainingBytes, atMs: performance.now(), ...forecast });
  return true;
}

const isAtRest = (status: MigrationStatus | undefined): boolean =>
  status === undefined || ['none', 'completed', 'failed', 'cancelled'].includes(status);

function throwIfOver(info: MigrationInfo): void {
  if (info.status !== 'failed' && info.status !== 'cancelled' && info.status !== 'postcopy-paused') return;
  const output = info['error-desc'] ?? `migration ${info.status}`;
  throw new AppError('qemu_failed', `QEMU could not send the memory of the VM: ${output}`, { output });
}
