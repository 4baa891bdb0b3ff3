/** The destination's half of a migration with the daemon around it. The VM's record is in step with who owns the VM. */

import { setImmediate, setTimeout as sleep } from 'node:timers/promises';
import { DestinationMigration } from '../../migration/destination.ts';
import { isDestinationOver } from '../../migration/destination-machine.ts';
import { diskMarkOf, unmarkDisk } from '../../migration/disk-mark.ts';
import type { Merged, Problem } from '../../migration/protocol.ts';
import type { SilentQemu } from '../../migration/streams-in.ts';
import { removeDiskSnapshot } from '../../vm/disk-snapshot.ts';
import { imageFile } from '../../vm/images.ts';
import { vmOfSets } from '../references/reference-sets.ts';
import type { Managed } from '../vms/registry.ts';
import { CostMeter } from './cost-meter.ts';
import { DoubtTimer, doubtAtDestination, isDestinationInDoubt, pagesAreMissing } from './doubt.ts';
import { escrowAt } from './escrow-client.ts';
import { type HalfParts, narrate } from './half.ts';
import { InTouch } from './in-touch.ts';
import { arrivingDiskLeaseS } from './peer-side.ts';
import { PrivateFile } from './private-file.ts';
import type { DestinationRecord } from './record.ts';

/** To sort the digests of all pages into an index. */
const rememberTimeoutMs = 120_000;
const rememberAfterMs = 1000;
const unmarkTimeoutMs = 30_000;
/** To make the disk and start a QEMU. */
const makeTimeoutMs = 120_000;

export interface DestinationHooks {
  /** What does not fit for the VM to come here. */
  check: () => Promise<Problem[]>;
  /** At rest for good. */
  onOver: () => void;
}

/** `found`: the VM as an earlier daemon has left it; `silent`: its QEMU, if that does not answer. */
export function makeDestination(
  parts: HalfParts,
  record: DestinationRecord,
  { found, silent }: { found?: Managed | undefined; silent?: SilentQemu | undefined },
  { check, onOver }: DestinationHooks,
): DestinationMigration {
  const { id, vm, options, peer } = record;
  const { journal, peers, registry, vms, runner, images, networks, paths, references } = parts;
  const ofSets = vmOfSets(vm, options, (each) => runner.diskOf(each));
  const tell = narrate(parts, record);
  const doubt = new DoubtTimer(() => {
    const explain = migration.state.name === 'arrived' ? pagesAreMissing : doubtAtDestination;
    tell.attention(explain(peer.name), { passing: true });
  });
  const lacksPages = (): boolean => migration.state.name === 'arrived' && !migration.state.complete;
  const inTouch = new InTouch(() => peers.warm(peer.id));
  let arriving = found;
  const noteWhere = ({ name }: DestinationMigration['state']): void => {
    if (!arriving) return;
    if (name === 'arrived' || name === 'merging') arriving.hasArrived = true;
    else delete arriving.hasArrived;
  };
  noteWhere(record.state);
  let isOver = false;
  let hasArrived = false;
  /** The source has left before the VM was whole. */
  let hasMerged = false;
  const manifest = new PrivateFile(paths.vm(vm.id), 'manifest');
  const diskManifest = new PrivateFile(paths.vm(vm.id), 'disk-manifest');
  const missing = new PrivateFile(paths.vm(vm.id), `missing-${id}`);
  let meter: CostMeter | undefined;

  const make = async (listen?: () => Promise<void>) => {
    meter ??= new CostMeter({
      pid: () => arriving?.record.process?.pid,
      directory: paths.vm(vm.id),
    });
    const image = options.storage === 'copied' ? images.get(vm.image.digest) : undefined;
    networks.destination.taken(id);
    const { spec, attachment } = networks.destination.settle(id, vm.spec);
    arriving = registry.add({
      id: vm.id,
      name: vm.name,
      state: 'arriving',
      spec,
      createdAt: new Date().toISOString(),
      epoch: vm.epoch,
      ...(attachment ? { attachment } : {}),
      ...(vm.continuity ? { continuity: vm.continuity } : {}),
      ...(vm.tenant ? { tenant: vm.tenant } : {}),
    });
    arriving.operationId = id;
    const { machine, accelerator } = await runner.receive(
      { ...vm, spec },
      image,
      { hasPostcopy: options.mode !== 'precopy', listen },
      AbortSignal.timeout(makeTimeoutMs),
    );
    registry.update(arriving, { process: machine.process, runningWith: accelerator });
    vms.attach(arriving, machine);
    return machine;
  };
  const end = async (state: DestinationMigration['state']): Promise<void> => {
    meter?.[Symbol.dispose]();
    if (arriving?.operationId === id) delete arriving.operationId;
    // The VM first: a daemon that dies in between finds the migration open, and ends it again.
    if (arriving && state.name === 'settled') await vms.settle(arriving, { epoch: state.epoch });
    await missing.remove();
    const merge = migration.mergeStatistics;
    if (state.name === 'absent') journal.forget(id);
    else journal.finish(id);
    if (hasMerged && merge) tellMerged({ name: 'merged', merge, ...(meter ? { cost: meter.cost } : {}) });
    onOver();
    // Its last word goes out first.
    await setImmediate();
    await migration.stop();
  };

  /** For the history of a source that is still there. */
  const tellMerged = (message: Merged): void => {
    peers.send(peer.id, id, message).catch(() => {
      // Its host may be switched off by now.
    });
  };

  const ofDisk = () => {
    if (!options.relayed?.diskRelays) return undefined;
    const { digest, format } = vm.image;
    return {
      directory: paths.vm(vm.id),
      file: runner.diskOf(vm),
      image: { file: imageFile(paths.images, digest, format), format },
      readManifest: () => diskManifest.read(),
      writeManifest: (bytes: Buffer) => diskManifest.write(bytes),
      removeManifest: () => diskManifest.remove(),
    };
  };

  const { custodian } = options.relayed ?? {};
  const diskMark = diskMarkOf(id);
  /** Nobody will go back to it any more. What is left of it takes room and does no harm. */
  const unmark = async (): Promise<void> => {
    const qmp = arriving?.machine?.qmp;
    const removing =
      qmp?.state === 'ready'
        ? unmarkDisk(qmp, diskMark)
        : removeDiskSnapshot(runner.diskOf(vm), diskMark, AbortSignal.timeout(unmarkTimeoutMs));
    await removing.catch((error) =>
      parts.log.warn({ err: error, vmId: vm.id }, 'a snapshot stays in its disk'),
    );
  };

  const migration: DestinationMigration = new DestinationMigration({
    vm,
    options,
    state: record.state,
    machine: found?.machine ?? null,
    silent,
    surroundings: {
      journal: { append: (state) => journal.append(record, state) },
      send: async (message) => {
        const isLast = message.name === 'running' && message.complete;
        const sent = peers.send(peer.id, id, isLast && meter ? { ...message, cost: meter.cost } : message);
        // It says every second that it runs: as long as nobody hears it, nobody sends the pages either.
        const isHeard = () => {
          doubt.stop();
          tell.goesOn();
        };
        if (lacksPages()) sent.then(isHeard, () => doubt.note(lacksPages()));
        await sent;
      },
      check: async () => {
        const problems = await check();
        // A `prepare` that comes again must not meet, as another VM, what the first one has made meanwhile.
        return arriving ? [] : problems;
      },
      make,
      sets: () => references.setsFor(ofSets),
      openReader: (name) => references.openBlocks(ofSets, name),
      remember: (digests) => {
        const remember = async (): Promise<void> => {
          // The guest has just begun to run here, and the cores are its own.
          await sleep(rememberAfterMs, undefined, { ref: false });
          await references.kept.remember(vm.id, digests, AbortSignal.timeout(rememberTimeoutMs));
        };
        remember().catch((error) => {
          // The way back will cost more, and that is all.
          parts.log.warn({ err: error, vmId: vm.id }, 'what the VM left behind is not remembered');
        });
      },
      missing: {
        read: () => missing.read(),
        write: (bits) => missing.write(bits, { isBrief: true }),
      },
      merging: {
        openRelay: (relay, group, holds) =>
          peers.openRelay(relay, id, group, holds, holds === 'disk' ? arrivingDiskLeaseS : undefined),
        readManifest: () => manifest.read(),
        writeManifest: (bytes) => manifest.write(bytes),
        removeManifest: async () => {
          await manifest.remove();
          if (custodian) await unmark();
        },
        tellOperator: (message) => tell.attention(message),
        disk: ofDisk(),
        escrow:
          custodian &&
          escrowAt({
            migrationId: id,
            custodian,
            peers,
            facts: () => ({ vm, epoch: vm.epoch + 1, diskMark }),
            tell: { ...tell, attention: (message) => tell.attention(message, { passing: true }) },
          }),
      },
      discard: async () => {
        if (arriving && registry.holds(arriving)) await vms.forget(arriving);
        await networks.destination.withdraw(id);
      },
      onState: (state) => {
        meter?.sample();
        noteWhere(state);
        if (state.name === 'merging') hasMerged = true;
        inTouch.keep(state.name === 'reserved' || state.name === 'waiting');
        if (!lacksPages()) doubt.note(isDestinationInDoubt(state));
        tell.state(state.name);
        if (state.name === 'arrived' && arriving && arriving.record.state === 'arriving')
          registry.update(arriving, { state: vm.running ? 'running' : 'paused', epoch: state.epoch });
        // Beside the migration, which does not wait for the guest.
        if (state.name === 'arrived' && arriving && !hasArrived) {
          hasArrived = true;
          networks.destination.arrived(id, arriving, { justNow: true }).catch((error: Error) => {
            tell.attention(`The VM runs here, but its network is not as it should be: ${error.message}`);
          });
        }
        if (!isDestinationOver(state) || isOver) return;
        isOver = true;
        end(state).catch((error) => tell.failure(error));
      },
      onStep: tell.step,
      onFailure: (error) => tell.failure(error),
    },
  });
  return migration;
}
