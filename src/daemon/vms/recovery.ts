/**
 * What a daemon does with the VMs that it finds in its records at start: guests outlive it, so most of them run.
 *
 *   record says          QEMU runs                      QEMU is gone
 *   creating, deleting   ended; nothing of it is kept   nothing of it is kept
 *   starting             ended; stopped                 stopped
 *   running, paused,     taken over, as QEMU says;      crashed, or stopped if that had been asked for
 *   stopping             asked again if it is silent
 *   stopped, crashed     (cannot be)                    as it is
 *   migrating, arriving  taken hold of, which its       left to its migration
 *                        migration waits for if it is
 *                        silent
 *
 * Directories that no record knows (the template of a golden snapshot, a capture for a clone) are removed, with
 * the QEMU that may still run in them.
 */
import { readdir, rm } from 'node:fs/promises';
import type { FastifyBaseLogger } from 'fastify';
import type { Uuid } from '../../model/ids.ts';
import type { Paths } from '../paths.ts';
import type { Managed, VmRegistry } from './registry.ts';
import type { Runner } from './runner.ts';
import type { VmWatch } from './watch.ts';

export interface RecoveryOptions {
  registry: VmRegistry;
  watch: VmWatch;
  runner: Runner;
  paths: Paths;
  knowsSnapshot: (id: Uuid) => boolean;
  log: FastifyBaseLogger;
}

export async function recoverVms(options: RecoveryOptions): Promise<void> {
  const { registry, runner, paths, knowsSnapshot, log } = options;
  // At once: one QEMU that does not answer must not hold up the others.
  await Promise.all(registry.all().map((managed) => recover(managed, options)));
  const known = new Set(registry.all().map(({ record }) => record.id));
  for (const id of await listIfThere(paths.vms)) {
    if (known.has(id)) continue;
    log.warn({ vmId: id }, 'removing what is left of a VM that no record knows');
    await runner.end(id);
    await runner.discard(id);
  }
  for (const id of await listIfThere(paths.snapshots)) {
    if (!knowsSnapshot(id)) await rm(paths.snapshot(id), { recursive: true, force: true });
  }
  await rm(paths.captures, { recursive: true, force: true });
}

async function recover(managed: Managed, options: RecoveryOptions): Promise<void> {
  const { registry, watch, runner, log } = options;
  const { record } = managed;
  const { id, state } = record;
  const fields = { vmId: id, name: record.name, state };
  switch (state) {
    case 'creating':
    case 'deleting':
      log.warn(fields, 'removing a VM that was half made or half deleted');
      await runner.end(id);
      await runner
        .removeSharedDisk(record)
        .catch((error) => log.warn({ ...fields, err: error }, 'its disk stays'));
      await runner.discard(id);
      registry.remove(managed);
      return;
    case 'starting':
      log.warn(fields, 'a start was interrupted');
      await runner.end(id);
      await runner.cleanUp(id);
      registry.update(managed, { state: 'stopped', process: undefined });
      return;
    case 'migrating':
    case 'arriving':
      // Whose it is, its migration knows; here it is only taken hold of again.
      await watch.takeHold(managed);
      return;
    case 'running':
    case 'paused':
    case 'stopping':
      await watch.takeOver(managed);
      return;
    case 'stopped':
    case 'crashed':
      return;
  }
}

const listIfThere = (directory: string): Promise<string[]> =>
  readdir(directory).catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ENOENT') return [];
    throw error;
  });
