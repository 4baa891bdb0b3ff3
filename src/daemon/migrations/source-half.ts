/** The source's half of a migration with the daemon around it. The VM's record is in step with who owns the VM. */

import { setImmediate } from 'node:timers/promises';
import type { Pools } from '../../migration/relayed/pools.ts';
import { SourceMigration } from '../../migration/source.ts';
import { isSourceOver, type SourceState } from '../../migration/source-machine.ts';
import type { MigrationProgress, MigrationResult } from '../../model/migration.ts';
import { keepMemory } from '../references/keep.ts';
import { vmOfSets } from '../references/reference-sets.ts';
import type { Managed } from '../vms/registry.ts';
import { CostMeter } from './cost-meter.ts';
import { DoubtTimer, doubtAtSource, isSourceInDoubt } from './doubt.ts';
import { type HalfParts, narrate } from './half.ts';
import { InTouch } from './in-touch.ts';
import { LinkMeter } from './link-meter.ts';
import type { SourceRecord } from './record.ts';

/** A destination that has not answered `prepare` by then is not waited for any longer. */
const prepareTimeoutMs = 120_000;
/** How long a migration that was undone here waits until the other side has cleared up. */
const withdrawTimeoutMs = 60_000;

export interface SourceHooks {
  onProgress?: (progress: MigrationProgress) => void;
  /** Of the VMs that leave from here. */
  pools: Pools;
  /** At rest for good, and all of it written down. */
  onOver: () => void;
}

/** `managed`: the VM, unless it has left long ago. */
export function makeSource(
  parts: HalfParts,
  record: SourceRecord,
  managed: Managed | undefined,
  { onProgress, pools, onOver }: SourceHooks,
): SourceMigration {
  const { id, vm, options, peer } = record;
  const { journal, peers, vms, runner, networks, paths, references } = parts;
  const ofSets = vmOfSets(vm, options, (each) => runner.diskOf(each));
  const tell = narrate(parts, record);
  const doubt = new DoubtTimer(() => tell.attention(doubtAtSource(peer.name, options), { passing: true }));
  let since = performance.now();
  let isOver = false;
  const link = new LinkMeter();
  const inTouch = new InTouch(() => peers.warm(peer.id));
  peers.limits.setMigration(id, options.limits);
  const meter = new CostMeter({
    pid: () => managed?.record.process?.pid,
    directory: paths.vm(vm.id),
    onSample: () => link.sample(),
  });

  const giveUpIfLate = ({ name }: SourceState): void => {
    const waitedMs = performance.now() - since;
    if (name === 'preparing' && waitedMs > prepareTimeoutMs) void migration.cancel().catch(() => {});
    if (name === 'withdrawing' && waitedMs > withdrawTimeoutMs) void migration.giveUp().catch(() => {});
  };
  const endPause = (): void => {
    const known = journal.get(id);
    if (!known?.options.limits.paused) return;
    const limits = { ...known.options.limits, paused: false };
    peers.limits.setMigration(id, limits);
    journal.update(id, () => ({ ...known, options: { ...known.options, limits } }));
  };
  const end = async (): Promise<void> => {
    const { state, progress } = migration;
    const result = withFigures(migration.result, meter, link, record);
    meter[Symbol.dispose]();
    peers.limits.forget(id);
    if (managed?.operationId === id) delete managed.operationId;
    // The VM first: a daemon that dies in between finds the migration open, and ends it again.
    if (managed && state.name === 'ended') await vms.settle(managed, { epoch: state.epoch });
    if (state.name === 'moved') await networks.source.moved(id);
    else await networks.source.stayed(id, managed);
    if (state.name === 'moved') tell.exited(result.exitMs ?? result.totalMs);
    journal.finish(id, { progress, result });
    onOver();
    // Its last word goes out first.
    await setImmediate();
    await migration.stop();
  };

  const migration: SourceMigration = new SourceMigration({
    id,
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
      openSession: async (purpose, ticket, signal) => {
        const session = await peers.openSession(peer.id, id, purpose, ticket, signal);
        link.add(session);
        return session;
      },
      openRelay: async (relay, group, holds) => {
        const session = await peers.openRelay(relay, id, group, holds);
        link.add(session);
        return session;
      },
      pool: () => pools.of(vm.tenant, peer.id),
      openIndex: (name) => references.openIndex(ofSets, name),
      keepMemory: references.kept.isOn ? (ram) => keepMemory(references.kept, vm.id, ram) : undefined,
      discard: async () => {
        // The destination has a disk of its own now; one that both open stays, for it is the VM's.
        if (managed && options.storage === 'copied') await runner.removeSharedDisk(managed.record);
        if (managed) await vms.forget(managed);
      },
      onState: (state) => {
        since = performance.now();
        if (state.name === 'copying') meter.copyBegins();
        else meter.sample();
        inTouch.keep(state.name === 'copying');
        doubt.note(isSourceInDoubt(state));
        if (state.name === 'withdrawing') void networks.source.turnBack(id);
        tell.state(state.name);
        if (!isSourceOver(state) || isOver) return;
        isOver = true;
        end().catch((error) => tell.failure(error));
      },
      onStep: tell.step,
      ...(onProgress ? { onProgress } : {}),
      onStopped: () => {
        endPause();
        void networks.source.turn(id);
      },
      tellOperator: (message) => tell.attention(message),
      onFailure: (error) => tell.failure(error),
    },
  });
  return migration;
}

/** What the machine of the migration cannot see: the link, and what it all cost here. */
function withFigures(
  result: MigrationResult,
  meter: CostMeter,
  link: LinkMeter,
  { imageBytes }: SourceRecord,
): MigrationResult {
  const { use } = link;
  const { guestShare } = meter;
  const usedBps = use && ((use.sentBytes + use.resentBytes) * 8000) / Math.max(1, result.totalMs);
  return {
    ...result,
    ...(imageBytes === undefined ? {} : { imageBytes }),
    ...(use ? { link: use } : {}),
    ...(use && use.rateBps > 0
      ? { linkUsePercent: Math.min(100, Math.round((100 * usedBps!) / use.rateBps)) }
      : {}),
    ...(guestShare ? { guest: guestShare } : {}),
    source: meter.cost,
  };
}
