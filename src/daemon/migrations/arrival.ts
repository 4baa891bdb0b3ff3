/** Whether a VM can come here: everything that can be known before its first byte, all of it at once. Pure. */
import type { Problem } from '../../migration/protocol.ts';
import { AppError } from '../../model/errors.ts';
import type { VmToMove } from '../../model/migration.ts';
import { formatBytes } from '../../model/units.ts';
import type { CloudletNetwork } from '../../network/index.ts';
import { checkSpec, type HostFacts } from '../../vm/host.ts';

export interface Place {
  host: HostFacts;
  networks: readonly CloudletNetwork[];
  /** What may be given to VMs. */
  freeMemoryBytes: number;
  freeDiskBytes: number;
  /** It is being emptied. */
  isDraining: boolean;
  /** The VM's base image; else it is sent first. */
  hasImage: boolean;
  /** Whether a VM of this id or name is here. */
  isTaken: (idOrName: string) => boolean;
  /** When the source asked, by its clock. */
  sentAt?: string | undefined;
  now?: number;
}

/** Certificates, tickets and logs of two sites do not fit together beyond this. */
const maxClockSkewMs = 5 * 60_000;

export function checkArrival(vm: VmToMove, place: Place): Problem[] {
  const problems: Problem[] = [];
  const add = (field: string, value: unknown, wanted: unknown, message: string) =>
    problems.push({ field, value, wanted, message });
  const { spec } = vm;
  if (place.isDraining) add('cloudlet', 'drained', 'undrained', 'the cloudlet is drained and takes no VMs');

  try {
    const accelerator = checkSpec({ ...spec, accelerator: vm.runningWith }, place.host);
    if (accelerator !== vm.runningWith)
      add('accelerator', vm.runningWith, accelerator, `it runs with ${vm.runningWith}`);
  } catch (error) {
    if (!(error instanceof AppError)) throw error;
    add(
      String(error.details.field ?? 'spec'),
      error.details.value ?? null,
      error.details.wanted ?? null,
      error.message,
    );
  }
  if (spec.memoryBytes > place.freeMemoryBytes) {
    const free = formatBytes(place.freeMemoryBytes);
    add(
      'memoryBytes',
      spec.memoryBytes,
      place.freeMemoryBytes,
      `it needs ${formatBytes(spec.memoryBytes)} of memory, ${free} are free`,
    );
  }
  const neededBytes = vm.diskBytes + (place.hasImage ? 0 : vm.image.fileBytes);
  if (neededBytes > place.freeDiskBytes) {
    const free = formatBytes(place.freeDiskBytes);
    add(
      'diskBytes',
      neededBytes,
      place.freeDiskBytes,
      `it needs ${formatBytes(neededBytes)} of disk, ${free} are free`,
    );
  }
  const names = place.networks.map(({ name }) => name);
  for (const [index, { network }] of spec.nets.entries()) {
    if (!names.includes(network))
      add(`nets.${index}.network`, network, names, `there is no network '${network}'`);
  }
  if (place.isTaken(vm.id)) add('id', vm.id, 'a VM that is not here', 'this VM is here already');
  else if (place.isTaken(vm.name))
    add('name', vm.name, 'a free name', `another VM has the name '${vm.name}'`);
  if (place.sentAt !== undefined) {
    const skewMs = (place.now ?? Date.now()) - Date.parse(place.sentAt);
    if (Math.abs(skewMs) > maxClockSkewMs) {
      add(
        'clock',
        skewMs,
        maxClockSkewMs,
        `the clocks of the two cloudlets differ by ${Math.round(skewMs / 1000)} s`,
      );
    }
  }
  return problems;
}
