/** The source's half of a migration with the daemon around it. The VM's record is in step with who owns the VM. */

import { setImmediate } from 'node:timers/promises';
import { SourceMigration } from '../../migration/source.ts';
import { isSourceOver, type SourceState } from '../../migration/source-machine.ts';
import type { MigrationProgress } from '../../model/migration.ts';
import type { Managed } from '../vms/registry.ts';
import { DoubtTimer, doubtAtSource, isSourceInDoubt } from './doubt.ts';
import { type HalfParts, narrate } from './half.ts';
import type { SourceRecord } from './record.ts';

/** A destination that has not answered `prepare` by then is not waited for any longer. */
const prepareTimeoutMs = 120_000;
/** How long a migration that was undone here waits until the other side has cleared up. */
const withdrawTimeoutMs = 60_000;

export interface SourceHooks {
  onProgress?: (progress: MigrationProgress) => void;
  /** At rest for good, and all of it written down. */
  onOver: () => void;
}

/** `managed`: the VM, unless it has left long ago. */
export function makeSource(
  parts: HalfParts,
  record: SourceRecord,
  managed: Managed | undefined,
  { onProgress, onOver }: SourceHooks,
): SourceMigration {
  const { id, vm, options, peer } = record;
  const { journal, peers, vms, runner, networks } = parts;
  const tell = narrate(parts, record);
  const doubt = new DoubtTimer(() => tell.attention(doubtAtSource(peer.name)));
  let since = performance.now();
  let isOver = false;

  const giveUpIfLate = ({ name }: SourceState): void => {
    const waitedMs = performance.now() - since;
    if (name === 'preparing' && waitedMs > prepareTimeoutMs) void migration.cancel().catch(() => {});
    if (name === 'withdrawing' && waitedMs > withdrawTimeoutMs) void migration.giveUp().catch(() => {});
  };
  const end = async (): Promise<void> => {
    const { state, progress, result } = migration;
    if (managed?.operationId === id) delete managed.operationId;
    // The VM first: a daemon that dies in between finds the migration open, and ends it again.
    if (managed && state.name === 'ended') await vms.settle(managed, { epoch: state.epoch });
    if (state.name === 'moved') await networks.source.moved(id);
    else await networks.source.stayed(id, managed);
    journal.finish(id, { progress, result });
    onOver();
    // Its last word goes out first.
    await setImmediate();
    await migration.stop();
  };

  const migration: SourceMigration = new SourceMigration({
    vm,
    options,
    state: record.state,
    machine: managed?.machine ?? null,
    surroundings: {
      journal: { append: (state) => journal.append(record, state) },
      send: async (message) => {
        giveUpIfLate(migration.state);
        await peers.send(peer.id, id, message);
      },
      openSession: (purpose, ticket, signal) => peers.openSession(peer.id, id, purpose, ticket, signal),
      discard: async () => {
        // The destination has a disk of its own now; one that both open stays, for it is the VM's.
        if (managed && options.storage === 'copied') await runner.removeSharedDisk(managed.record);
        if (managed) await vms.forget(managed);
      },
      onState: (state) => {
        since = performance.now();
        doubt.note(isSourceInDoubt(state));
        tell.state(state.name);
        if (!isSourceOver(state) || isOver) return;
        isOver = true;
        end().catch(tell.failure);
      },
      ...(onProgress ? { onProgress } : {}),
      tellOperator: (message) => tell.attention(message),
      onFailure: (error) => tell.failure(error),
    },
  });
  return migration;
}
