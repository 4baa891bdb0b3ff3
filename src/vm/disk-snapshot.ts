/** Internal snapshots of a qcow2 that no QEMU of this host runs on: back to one, and away with one. */
import { AppError } from '../model/errors.ts';
import { isRemote } from './disk-node.ts';
import { CommandFailed, run } from './run.ts';

const timeoutMs = 60_000;

/**
 * Throws `in_use` when somebody writes to it. Seen by QEMU's lock, which is on the storage as far as that has locks: where
 * it has none (by URL) this says nothing.
 */
export async function requireUnopened(source: string, signal: AbortSignal): Promise<void> {
  if (isRemote(source)) return;
  await withImage(source, ['info', '--output=json', '-f', 'qcow2', source], signal);
}

/** What was written since then is gone. */
export async function revertDisk(source: string, name: string, signal: AbortSignal): Promise<void> {
  await withImage(source, ['snapshot', '-q', '-a', name, source], signal);
}

export async function removeDiskSnapshot(source: string, name: string, signal: AbortSignal): Promise<void> {
  await withImage(source, ['snapshot', '-q', '-d', name, source], signal);
}

async function withImage(source: string, argv: string[], signal: AbortSignal): Promise<void> {
  try {
    await run('qemu-img', argv, { signal, timeoutMs });
  } catch (error) {
    if (!(error instanceof CommandFailed) || !/lock/.test(error.stderr)) throw error;
    throw new AppError(
      'in_use',
      `The disk ${source} is open somewhere: a QEMU runs on it, or its storage does not know yet that it is gone`,
      { usedBy: [{ kind: 'qemu', name: source }] },
      { cause: error },
    );
  }
}
