/** Free disk space: asked for before anything is written, and recognised when it runs out all the same. */
import { statfs } from 'node:fs/promises';
import { AppError } from '../model/errors.ts';
import { formatBytes, MiB } from '../model/units.ts';
import { CommandFailed } from './run.ts';

/** What stays free for the daemon's own database and logs, unless the caller says otherwise. */
export const defaultReserveBytes = 256 * MiB;

/** Bytes that this process may still write to the file system of `directory`. */
export async function freeBytes(directory: string): Promise<number> {
  const { bavail, bsize } = await statfs(directory);
  return bavail * bsize;
}

/** Throws `insufficient_space` unless `wantedBytes` fit and `reserveBytes` stay free. */
export async function requireSpace(
  action: string,
  directory: string,
  wantedBytes: number,
  reserveBytes: number,
): Promise<void> {
  const free = await freeBytes(directory);
  if (free - reserveBytes < wantedBytes) throw noSpace(action, wantedBytes, free, reserveBytes);
}

/** The same error for a write that met a full disk; any other error comes back as it is. */
export async function explainNoSpace(
  error: unknown,
  action: string,
  directory: string,
  wantedBytes: number,
): Promise<unknown> {
  if (!isNoSpace(error)) return error;
  return noSpace(action, wantedBytes, await freeBytes(directory), 0, error);
}

function isNoSpace(error: unknown): boolean {
  if (error instanceof CommandFailed) return /No space left on device|Disk quota exceeded/.test(error.stderr);
  const code = (error as NodeJS.ErrnoException).code;
  return code === 'ENOSPC' || code === 'EDQUOT';
}

function noSpace(action: string, wantedBytes: number, free: number, reserveBytes: number, cause?: unknown) {
  const reserve = reserveBytes > 0 ? ` besides a reserve of ${formatBytes(reserveBytes)}` : '';
  return new AppError(
    'insufficient_space',
    `${action}: ${formatBytes(free)} are free, wanted ${formatBytes(wantedBytes)}${reserve}`,
    { wantedBytes, freeBytes: free, reserveBytes },
    { cause },
  );
}
