/**
 * An operator's claim: the VM goes on here as it left its source, out of what relays hold. Nothing runs, and the disk is
 * not touched, before all of its memory is in a QEMU that stands still.
 */
import { createConnection } from 'node:net';
import { unmarkDisk } from '../../migration/disk-mark.ts';
import { listenForMemory, stopListening, waitUntilLoaded } from '../../migration/memory-in.ts';
import type { Preflight } from '../../migration/preflight.ts';
import type { Manifest } from '../../migration/relayed/manifest.ts';
import type { WholeStream } from '../../migration/relayed/memory-merging.ts';
import { Restore } from '../../migration/relayed/restore.ts';
import { AppError } from '../../model/errors.ts';
import type { Uuid } from '../../model/ids.ts';
import type { MigrationOptions, VmToMove } from '../../model/migration.ts';
import { requireUnopened, revertDisk } from '../../vm/disk-snapshot.ts';
import type { PeerSide } from '../migrations/peer-side.ts';
import type { OperationContext } from '../operations.ts';
import type { Managed, VmRegistry } from '../vms/registry.ts';
import type { Runner } from '../vms/runner.ts';
import type { VmService } from '../vms/service.ts';
import type { EscrowRecord } from './record.ts';

export interface ClaimParts {
  cloudletId: Uuid;
  registry: VmRegistry;
  vms: VmService;
  runner: Runner;
  peers: PeerSide;
  /** What does not fit for the VM to be here. */
  fit: (vm: VmToMove, options: MigrationOptions) => Promise<Preflight>;
}

interface Claim {
  record: EscrowRecord;
  manifest: Manifest;
  whole: WholeStream;
  work: OperationContext;
  /** Writes the next state of the escrow; throws when there is none. Gives the epoch by which the VM is ours. */
  onState: (state: 'claimed' | 'run') => number;
}

const progressEveryMs = 500;

/** What is asked of a host that a VM would move to by its memory alone. */
const options: MigrationOptions = {
  mode: 'precopy',
  storage: 'shared',
  limits: { downtimeMs: 300, autoConverge: false },
  channels: 0,
};

/** Whatever fails before the VM runs here leaves nothing here, and may be tried again. */
export async function claimFromRelays(parts: ClaimParts, claim: Claim): Promise<void> {
  const { registry, vms, runner, peers } = parts;
  const { record, manifest, whole, work, onState } = claim;
  const { vm, diskMark } = record.deposit!;
  const { migrationId } = record;
  const { signal } = work;
  const { problems } = await parts.fit(vm, options);
  if (problems.length > 0) {
    const list = problems.map(({ message }) => message).join('; ');
    throw new AppError('migration_refused', `Cannot claim VM '${vm.name}': ${list}`, { problems });
  }
  const disk = runner.diskOf(vm);
  await requireUnopened(disk, signal);
  // Its addresses are those of another site.
  const { id, name, spec, tenant } = vm;
  const createdAt = new Date().toISOString();
  const managed = registry.add({
    id,
    name,
    spec,
    createdAt,
    state: 'arriving',
    epoch: record.deposit!.epoch,
    ...(tenant ? { tenant } : {}),
  });
  managed.operationId = migrationId;
  let hasRun = false;
  const { relays, group } = manifest.division;
  let restore: Restore | undefined;
  let epoch = 0;
  try {
    const { machine, accelerator } = await runner.receive(vm, undefined, { hasPostcopy: false }, signal);
    registry.update(managed, { process: machine.process, runningWith: accelerator });
    vms.attach(managed, machine);
    const socketPath = machine.paths.incoming;
    await listenForMemory(machine.qmp, { socketPath, postcopy: false, channels: 0 });
    restore = new Restore({
      qemu: createConnection({ path: socketPath, allowHalfOpen: true }),
      manifest,
      whole,
      open: (relay) => peers.openRelay(relays[relay]!, migrationId, group, 'memory'),
      signal,
    });
    await reporting(restore, work, () => restore!.run());
    await waitUntilLoaded(machine.qmp, signal);
    await stopListening(machine.qmp);
    epoch = onState('claimed');
    await revertDisk(disk, diskMark, signal);
    onState('run');
    hasRun = true;
    if (vm.running) await machine.resume();
    await unmarkDisk(machine.qmp, diskMark);
  } catch (error) {
    if (!hasRun) await forget(parts, managed);
    throw error;
  } finally {
    delete managed.operationId;
    if (hasRun) await vms.settle(managed, { epoch });
    await restore?.end({ drop: hasRun });
    peers.limits.forget(migrationId);
  }
}

async function forget({ vms }: ClaimParts, managed: Managed): Promise<void> {
  await managed.machine?.kill();
  await vms.forget(managed);
}

async function reporting(restore: Restore, { progress }: OperationContext, run: () => Promise<void>) {
  const report = () => progress({ phase: 'merge', ...restore.progress, unit: 'steps' });
  const timer = setInterval(report, progressEveryMs);
  try {
    await run();
    report();
  } finally {
    clearInterval(timer);
  }
}
