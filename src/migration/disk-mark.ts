/**
 * The disk as it was when a VM stood still for its switchover, kept beside what the VM writes afterwards: an internal
 * snapshot of the qcow2. Whoever goes on with the memory of that moment puts the disk back to it first.
 */
import { AppError } from '../model/errors.ts';
import type { Uuid } from '../model/ids.ts';
import type { QmpConnection } from '../qmp/index.ts';
import { nodeNames } from '../vm/argv.ts';

export const diskMarkOf = (migrationId: Uuid): string => `viper-${migrationId}`;

/** The VM stands still, and the disk is still this QEMU's. */
export async function markDisk(qmp: QmpConnection, name: string): Promise<void> {
  await qmp.execute('blockdev-snapshot-internal-sync', { device: nodeNames.disk, name });
}

/** One that is not there is no error. */
export async function unmarkDisk(qmp: QmpConnection, name: string): Promise<void> {
  try {
    await qmp.execute('blockdev-snapshot-delete-internal-sync', { device: nodeNames.disk, name });
  } catch (error) {
    if (!(error instanceof AppError) || error.details.qmpClass === undefined) throw error;
  }
}
