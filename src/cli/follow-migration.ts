/**
 * Watches a migration until it is over. The operation that asked for it ends with the daemon that ran it; the
 * migration does not, so where that happens it is the migration that is followed.
 */
import { formatBytes } from '../model/units.ts';
import { type Migration, type Operation, ViperError } from '../sdk/client.ts';
import { delay } from '../sdk/delay.ts';
import { Interrupted } from './failures.ts';
import { type MigrationView, showMigration } from './migration-progress.ts';
import { formatDuration } from './output.ts';
import { showProgress } from './progress.ts';
import type { Session } from './session.ts';

const pollMs = 400;
/** A merge whose end nobody tells is not waited for any longer. */
const longestMergeMs = 600_000;
/** How long a daemon may stay away, for a restart. */
const absenceMs = 30_000;

/** The migration once it has moved the VM; throws what it came to if it has not. */
export async function followMigration(session: Session, id: string, timeoutMs?: number): Promise<Migration> {
  return orTellThatItGoesOn(id, async () => {
    using view = showMigration('migrate', session.output);
    const ended = await untilOver(session, id, view, timeoutMs);
    if (!ended.failure) return ended;
    const { code, message, problems } = ended.failure;
    throw new ViperError(
      code === 'refused' ? 'migration_refused' : 'migration_failed',
      `VM '${ended.vm.name}' was not moved: ${message}`,
      { details: { reason: code, ...(problems ? { problems } : {}) } },
    );
  });
}

/** As `followMigration`, from the operation of `viper vm migrate`, which begins earlier: with the base image. */
export async function followOperation(
  session: Session,
  operation: Operation,
  timeoutMs?: number,
): Promise<Migration> {
  const { viper, output, signal } = session;
  const { migrationId: id, name = 'VM' } = operation.subject;
  if (id === undefined) throw new ViperError('bad_reply', `Operation ${operation.id} names no migration`);
  return orTellThatItGoesOn(id, async () => {
    const stop = new AbortController();
    try {
      using image = showProgress(`image of ${name}`, output);
      using view = showMigration(`migrate ${name}`, output);
      const watching = watchBeside(session, id, AbortSignal.any([signal, stop.signal]), (progress) => {
        image[Symbol.dispose]();
        view.update(progress);
      });
      try {
        await viper.wait(operation, {
          signal,
          onProgress: ({ progress }) => progress?.phase === 'image' && image.update(progress),
          ...(timeoutMs === undefined ? {} : { timeoutMs }),
        });
      } finally {
        stop.abort();
        await watching;
      }
    } catch (error) {
      if (!(error instanceof ViperError) || error.code !== 'interrupted') throw error;
      return await followMigration(session, id, timeoutMs);
    }
    return await viper.getMigration({ params: { migration: id }, signal });
  });
}

/**
 * After the exit of a relayed migration: until its destination has all of the VM, as far as this cloudlet hears of it,
 * which may be switched off by then.
 */
export async function followMerge(
  session: Session,
  moved: Migration,
  timeoutMs?: number,
): Promise<Migration> {
  const { output, viper, signal } = session;
  const { id, vm, peer, result } = moved;
  if (!isMerging(moved)) return moved;
  output.say(
    `VM ${vm.name} has left after ${formatDuration(result?.exitMs ?? 0)}: nothing of it is here any more. ` +
      `${peer.name} fetches the rest from ${namesOf(result?.relayed?.relays)}.`,
  );
  const deadline = Date.now() + (timeoutMs ?? longestMergeMs);
  while (Date.now() < deadline) {
    await delay(pollMs, signal);
    try {
      const seen = await viper.getMigration({ params: { migration: id }, signal });
      if (!isMerging(seen)) return seen;
    } catch (error) {
      if (error instanceof ViperError && error.code === 'unreachable') break;
      throw error;
    }
  }
  return moved;
}

const isMerging = ({ result, failure }: Migration): boolean =>
  !failure && (result?.relayed?.slabs ?? 0) > 0 && result?.merge === undefined;

const namesOf = (relays: { name: string }[] = []): string => relays.map(({ name }) => name).join(', ');

/** `VM web runs at south: 12 s in all, 85 ms downtime, 17 MiB sent of 705 MiB.` */
export function summaryOf({ vm, peer, role, result }: Migration): string {
  const place = role === 'source' ? `at ${peer.name}` : 'here';
  if (!result) return `VM ${vm.name} runs ${place}.`;
  const { totalMs, exitMs, downtimeMs, memoryBytes, diskBytes, relayed, merge, condensed } = result;
  const isRelayed = relayed !== undefined && relayed.slabs > 0;
  const moved = condensed
    ? `${formatBytes(condensed.wireBytes)} sent of ${formatBytes(condensed.guestBytes)}`
    : `${formatBytes(memoryBytes + diskBytes)} sent`;
  const parts = [
    isRelayed && exitMs !== undefined ? `${formatDuration(exitMs)} until it had left` : '',
    isRelayed && !merge ? '' : `${formatDuration(totalMs)} in all`,
    downtimeMs === undefined ? '' : `${formatDuration(downtimeMs)} downtime`,
    moved,
  ];
  return `VM ${vm.name} runs ${place}: ${parts.filter((part) => part !== '').join(', ')}.`;
}

async function orTellThatItGoesOn<T>(id: string, follow: () => Promise<T>): Promise<T> {
  try {
    return await follow();
  } catch (error) {
    if (!(error instanceof Interrupted)) throw error;
    throw new Interrupted(
      `not waiting any longer, but migration ${id} goes on\n` +
        `  watch it:  viper migration watch ${id}\n  cancel it: viper migration cancel ${id}`,
    );
  }
}

async function untilOver(
  { viper, signal }: Session,
  id: string,
  view: MigrationView,
  timeoutMs = Number.POSITIVE_INFINITY,
): Promise<Migration> {
  const deadline = Date.now() + timeoutMs;
  for (let lastAnswer = Date.now(); ; ) {
    try {
      const seen = await viper.getMigration({ params: { migration: id }, signal });
      lastAnswer = Date.now();
      if (seen.over) return seen;
      if (seen.progress) view.update(seen.progress);
    } catch (error) {
      const away = error instanceof ViperError && error.code === 'unreachable';
      if (!away || Date.now() - lastAnswer > absenceMs) throw error;
    }
    if (Date.now() >= deadline) {
      throw new ViperError('timeout', `Migration ${id} is not over within ${timeoutMs} ms; it goes on`, {
        details: { waitedMs: timeoutMs },
      });
    }
    await delay(pollMs, signal);
  }
}

/** For the bar only: what goes wrong here, whoever waits for the operation meets as well. */
async function watchBeside(
  { viper }: Session,
  id: string,
  signal: AbortSignal,
  onProgress: (progress: NonNullable<Migration['progress']>) => void,
): Promise<void> {
  while (!signal.aborted) {
    try {
      const { progress } = await viper.getMigration({ params: { migration: id }, signal });
      if (progress && !signal.aborted) onProgress(progress);
    } catch {
      // Not there yet, or the daemon is away for a moment.
    }
    await delay(pollMs, signal).catch(() => {});
  }
}
