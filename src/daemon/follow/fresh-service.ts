/**
 * Where a migration would serve the user worse (thesis, algorithm 4.7, step 5): a fresh VM of the same image and
 * hardware begins near the device, and the old one ends. The old one ends only once the fresh one runs.
 */
import type { Static } from 'typebox';
import type * as schemas from '../../contract/schemas.ts';
import { AppError } from '../../model/errors.ts';
import type { DeviceRecord } from '../../model/follow.ts';
import { isUuid, type Uuid } from '../../model/ids.ts';
import type { VmRecord } from '../../model/vm.ts';
import type { Credentials } from '../credentials.ts';
import type { Fleet } from '../fleet.ts';
import type { Operations } from '../operations.ts';
import type { VmService } from '../vms/service.ts';
import type { Devices } from './devices.ts';

export type FreshVm = Static<typeof schemas.FreshVm>;

/** Nothing is booted in it: the answer comes when its QEMU runs. */
const startTimeoutMs = 120_000;

/** What the next cloudlet is asked for; undefined if the device's token is no longer good. */
export function freshVmFor(
  { name, spec, tenant }: VmRecord,
  device: DeviceRecord,
  credentials: Credentials,
): FreshVm | undefined {
  const credential = credentials.handOut(device.credentialId);
  if (!credential) return undefined;
  const { machine, cpu, memoryBytes, disk, nets, seed } = spec;
  return {
    name,
    image: disk.image,
    hardware: {
      machine,
      cpu,
      memoryBytes,
      diskBytes: disk.sizeBytes,
      // Its addresses and cards are the old one's until that has ended.
      nets: nets.map(({ network }) => ({ network })),
    },
    seed: { sshKeys: seed.sshKeys, ...(seed.userData === undefined ? {} : { userData: seed.userData }) },
    ...(tenant === undefined ? {} : { tenant }),
    device: {
      id: device.id,
      name: device.name,
      macs: device.macs,
      addresses: device.addresses,
      createdAt: device.createdAt,
      credential,
    },
  };
}

/** Asks a cloudlet for it and gives its id once it runs. Errors: those of creating a VM there, `peer_unreachable`. */
export async function askForFresh(fleet: Fleet, target: Uuid, body: FreshVm): Promise<Uuid> {
  const peer = fleet.directory.get(target);
  if (!peer) throw new AppError('not_found', `There is no peer ${target}`, { kind: 'peer', name: target });
  const init = { method: 'POST' as const, json: body, timeoutMs: startTimeoutMs };
  const { vmId } = ((await fleet.client.fetch(peer, '/v1/fresh-vms', init)) ?? {}) as { vmId?: unknown };
  if (typeof vmId === 'string' && isUuid(vmId)) return vmId;
  throw new AppError('peer_unreachable', `${peer.url} did not say which VM it has started`, {
    url: peer.url,
  });
}

/** The other side: makes the VM, and the device is its own from then on. */
export async function startFresh(
  { vms, operations, devices }: { vms: VmService; operations: Operations; devices: Devices },
  { device: { id, ...handOver }, ...wanted }: FreshVm,
  from: { cloudletId: Uuid },
): Promise<{ vmId: Uuid }> {
  const started = await vms.create(wanted);
  const { error, subject } = await operations.wait(started.id);
  if (error) throw new AppError(error.code, error.message, error.details);
  const vmId = subject.vmId!;
  devices.takeOver(id, { ...handOver, vmId }, from, vmId);
  return { vmId };
}
