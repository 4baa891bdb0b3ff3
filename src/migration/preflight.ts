/**
 * Whether a VM fits a destination: asked by the source before anything is sent, and by the destination again, of
 * its own facts. Pure, and gives everything that does not fit at once.
 */
import type { MigrationOptions, VmToMove } from '../model/migration.ts';
import { formatBytes } from '../model/units.ts';
import type { HostFacts } from '../vm/host.ts';
import type { Problem } from './protocol.ts';

/** What a destination says of itself. */
export interface DestinationFacts {
  qemu: {
    version: string;
    machines: string[];
    cpuModels: string[];
    /** By model, with the accelerator of `featuresWith`. */
    missingCpuFeatures: Record<string, string[]>;
    canPostcopy: boolean;
  };
  featuresWith: 'kvm' | 'tcg';
  accelerators: ('kvm' | 'tcg')[];
  memory: { freeBytes: number };
  /** What may still be written, its reserve left out. */
  disk: { freeBytes: number };
  images: string[];
  /** By name. */
  storages: string[];
  /** A disk on shared storage can be opened there. Of others it says nothing. */
  seesDisk: boolean;
  networks: string[];
  vms: { id: string; name: string }[];
  /** Its clock against ours, and how wrong that figure may be (half a round trip). */
  clock: { offsetMs: number; uncertaintyMs: number };
}

export interface SourceFacts {
  qemu: { version: string };
  /** What the VM's CPU model has and the VM does not, since the source's host lacks it too. */
  missingCpuFeatures: string[];
}

export interface Preflight {
  /** Empty: the VM fits. */
  problems: Problem[];
  /** The base image is not there, and goes first. Not a problem if there is room for it. */
  imageToSend: boolean;
}

/** Tickets and certificates live for minutes; clocks further apart than this would refuse good ones. */
const mostClockSkewMs = 30_000;
/** What QEMU itself takes beside the guest's memory. */
const qemuOverheadBytes = 64 * 1024 * 1024;

export function checkFit(
  vm: VmToMove,
  options: Pick<MigrationOptions, 'storage' | 'mode' | 'relayed'>,
  source: SourceFacts,
  destination: DestinationFacts,
): Preflight {
  const imageToSend = options.storage === 'copied' && !destination.images.includes(vm.image.digest);
  const problems = [
    ...checkQemu(vm, source, destination),
    ...checkMode(options, destination),
    ...checkStorage(vm, options, destination),
    ...checkRoom(vm, options, destination, imageToSend),
    ...checkNetworks(vm, destination),
    ...checkIdentity(vm, destination),
    ...checkClock(destination),
  ];
  return { problems, imageToSend };
}

/** The part of a destination's facts that its own QEMU tells. */
export const qemuFactsOf = ({ qemu }: Pick<HostFacts, 'qemu'>): DestinationFacts['qemu'] => ({
  version: qemu.version,
  machines: qemu.machines.map(({ name }) => name),
  cpuModels: qemu.cpuModels,
  missingCpuFeatures: qemu.missingCpuFeatures,
  canPostcopy: qemu.canPostcopy,
});

/**
 * For a VM that runs here; under KVM it has them all, or QEMU would not have started it. `undefined` if it is not known:
 * what QEMU lacks is asked of one accelerator alone.
 */
export const missingCpuFeaturesOf = (
  { spec, runningWith }: Pick<VmToMove, 'spec' | 'runningWith'>,
  { qemu, accelerator }: Pick<HostFacts, 'qemu' | 'accelerator'>,
): string[] | undefined => {
  if (runningWith === 'kvm') return [];
  return runningWith === accelerator ? qemu.missingCpuFeatures[spec.cpu.model] : undefined;
};

function* checkQemu(vm: VmToMove, source: SourceFacts, destination: DestinationFacts) {
  const { qemu, accelerators } = destination;
  const { machine, cpu } = vm.spec;
  if (!qemu.machines.includes(machine)) {
    const isOlder = compareVersions(qemu.version, source.qemu.version) < 0;
    const why = isOlder ? `, which is older than the source's ${source.qemu.version}` : '';
    yield problem('machine', machine, qemu.machines, `QEMU ${qemu.version}${why} does not have ${machine}`);
  }
  if (!qemu.cpuModels.includes(cpu.model))
    yield problem('cpu.model', cpu.model, qemu.cpuModels, `QEMU ${qemu.version} has no CPU ${cpu.model}`);
  const missing =
    destination.featuresWith === vm.runningWith ? qemu.missingCpuFeatures[cpu.model] : undefined;
  const lacking = missing?.filter((feature) => !source.missingCpuFeatures.includes(feature)) ?? [];
  if (lacking.length > 0) {
    const message = `The CPU there lacks ${lacking.join(', ')}, which a VM with ${cpu.model} has here`;
    yield problem('cpu.features', lacking, 'every feature that the VM has', message);
  }
  if (!accelerators.includes(vm.runningWith)) {
    const message = `The VM runs with ${vm.runningWith}, which the destination does not have`;
    yield problem('accelerator', vm.runningWith, accelerators, message);
  }
}

function* checkMode({ mode }: Pick<MigrationOptions, 'mode'>, { qemu }: DestinationFacts) {
  if (mode === 'precopy' || qemu.canPostcopy) return;
  const message = `The host lets its QEMU do no post-copy (userfaultfd), which ${mode} may come to`;
  yield problem('mode', mode, 'precopy', message);
}

function* checkStorage(
  { spec }: VmToMove,
  options: Pick<MigrationOptions, 'storage'>,
  { storages, seesDisk }: DestinationFacts,
) {
  if (options.storage === 'copied') return;
  const { storage } = spec.disk;
  if (storage === undefined) {
    const message = 'The disk is in the own directory of the source, where nobody else can open it';
    yield problem('disk.storage', null, storages, message);
  } else if (!storages.includes(storage)) {
    yield problem('disk.storage', storage, storages, `There is no storage '${storage}'`);
  } else if (!seesDisk) {
    const message = `The disk of the VM is not on the storage that is called '${storage}' there`;
    yield problem('disk.storage', storage, 'the same storage', message);
  }
}

function* checkRoom(
  vm: VmToMove,
  { storage, relayed }: Pick<MigrationOptions, 'storage' | 'relayed'>,
  { memory, disk }: DestinationFacts,
  imageToSend: boolean,
) {
  const memoryBytes = vm.spec.memoryBytes + qemuOverheadBytes;
  if (memory.freeBytes < memoryBytes)
    yield problem(
      'memory',
      memory.freeBytes,
      memoryBytes,
      `${formatBytes(memory.freeBytes)} of memory are free, wanted ${formatBytes(memoryBytes)}`,
    );
  if (storage === 'shared') return;
  // What came by way of relays is there twice until it is all in the VM's own overlay; see `arriving-disk`.
  const copies = relayed?.diskRelays ? 2 : 1;
  const diskBytes = copies * vm.diskBytes + (imageToSend ? vm.image.fileBytes : 0);
  if (disk.freeBytes < diskBytes)
    yield problem(
      'disk',
      disk.freeBytes,
      diskBytes,
      `${formatBytes(disk.freeBytes)} of disk are free, wanted ${formatBytes(diskBytes)}`,
    );
}

function* checkNetworks(vm: VmToMove, { networks }: DestinationFacts) {
  for (const [index, { network }] of vm.spec.nets.entries())
    if (!networks.includes(network))
      yield problem(`nets.${index}.network`, network, networks, `There is no network '${network}'`);
}

function* checkIdentity(vm: VmToMove, { vms }: DestinationFacts) {
  if (vms.some(({ id }) => id === vm.id))
    yield problem('id', vm.id, 'an id that is not there', `The VM ${vm.id} is there already`);
  else if (vms.some(({ name }) => name === vm.name))
    yield problem('name', vm.name, 'a name that is free', `Another VM there is called '${vm.name}'`);
}

function* checkClock({ clock: { offsetMs, uncertaintyMs } }: DestinationFacts) {
  // Only what is certainly too far: a slow link must not look like a wrong clock.
  const skewMs = Math.max(0, Math.abs(offsetMs) - uncertaintyMs);
  if (skewMs > mostClockSkewMs)
    yield problem(
      'clock',
      Math.round(offsetMs),
      `at most ${mostClockSkewMs} ms`,
      `The clocks are at least ${Math.round(skewMs)} ms apart`,
    );
}

function compareVersions(a: string, b: string): number {
  return a.localeCompare(b, 'en', { numeric: true });
}

const problem = (field: string, value: unknown, wanted: unknown, message: string): Problem => ({
  field,
  value,
  wanted,
  message,
});
