/** From what a caller asked for to a spec that pins everything. Pure, but for the random MAC addresses. */
import type { Static } from 'typebox';
import type { CreateVm, Hardware } from '../../contract/schemas.ts';
import { AppError } from '../../model/errors.ts';
import { newMac } from '../../model/ids.ts';
import type { ImageRecord, InstanceType, VmSpec } from '../../model/vm.ts';
import type { Config } from '../config.ts';
import { invalidRequest } from '../http/validation.ts';

type Wanted = Pick<Static<typeof CreateVm>, 'name' | 'instanceType' | 'hardware' | 'seed' | 'storage'>;

/** The type that a VM gets when the caller names none. */
const defaultInstanceType = 'small';

export function findInstanceType(config: Config, name = defaultInstanceType): InstanceType {
  const found = config.instanceTypes.find((type) => type.name === name);
  if (found) return found;
  const known = config.instanceTypes.map((type) => type.name).join(', ');
  throw invalidRequest([{ field: 'body.instanceType', value: name, wanted: `one of ${known}` }]);
}

/** The instance type gives what `hardware` leaves open; the config gives machine type and CPU model. */
export function specFor(wanted: Wanted, image: ImageRecord, config: Config): VmSpec {
  const type = findInstanceType(config, wanted.instanceType);
  const hardware: Static<typeof Hardware> = wanted.hardware ?? {};
  const nets: { network: string; mac?: string }[] =
    hardware.nets ?? type.nets.map((network) => ({ network }));
  for (const [index, net] of nets.entries()) {
    if (config.networks.some((network) => network.name === net.network)) continue;
    throw new AppError('unsupported', `This cloudlet has no network '${net.network}'`, {
      field: `body.hardware.nets.${index}.network`,
      value: net.network,
      wanted: config.networks.map((network) => network.name),
    });
  }
  if (hardware.diskBytes !== undefined && hardware.diskBytes < image.virtualBytes) {
    const wantedSize = `at least the image's ${image.virtualBytes}`;
    throw invalidRequest([
      { field: 'body.hardware.diskBytes', value: hardware.diskBytes, wanted: wantedSize },
    ]);
  }
  return {
    machine: hardware.machine ?? config.machine,
    accelerator: hardware.accelerator ?? 'auto',
    cpu: { model: hardware.cpu?.model ?? config.cpuModel, count: hardware.cpu?.count ?? type.cpus },
    memoryBytes: hardware.memoryBytes ?? type.memoryBytes,
    disk: {
      image: image.digest,
      sizeBytes: hardware.diskBytes ?? Math.max(type.diskBytes, image.virtualBytes),
      ...(wanted.storage === undefined ? {} : { storage: wanted.storage }),
    },
    nets: nets.map((net) => ({ network: net.network, mac: net.mac ?? newMac() })),
    seed: {
      hostname: wanted.name,
      sshKeys: wanted.seed?.sshKeys ?? [],
      addresses: wanted.seed?.addresses ?? [],
      ...(wanted.seed?.userData === undefined ? {} : { userData: wanted.seed.userData }),
    },
  };
}

/** The same hardware for another VM: its own MACs and host name. */
export function withNewIdentity(spec: VmSpec, hostname: string): VmSpec {
  const macs = new Map(spec.nets.map((net) => [net.mac, newMac()]));
  return {
    ...spec,
    nets: spec.nets.map((net) => ({ ...net, mac: macs.get(net.mac)! })),
    // A static address belongs to the original: two guests with one address would cut each other off.
    seed: {
      ...spec.seed,
      hostname,
      addresses: [],
      ...(spec.seed.waiting ? { waiting: spec.seed.waiting.flatMap((mac) => macs.get(mac) ?? []) } : {}),
    },
  };
}
