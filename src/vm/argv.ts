/**
 * A VM spec as the argument list of QEMU. Pure, and the same spec always gives the same hardware: every device
 * has a fixed bus and address, so that a host that takes the VM over sees it at the same place, whatever the
 * order of arguments and whatever was hot-plugged in between.
 *
 *   pcie.0  02 disk  03 seed  04 virtio-serial  05 rng  06 balloon
 *           10-17 network interfaces 0-7        1c.0-3 root ports for hot-plug (hotplug0..3)
 *
 * Nothing here passes through a shell. Values inside old-style options have their commas doubled; everything else
 * is JSON, which needs no quoting (`-blockdev` and `-device` since QEMU 4.2 and 6.2, `-netdev` since 7.2).
 */
import type { Accelerator, VmSpec } from '../model/vm.ts';
import { diskNode, isRemote } from './disk-node.ts';
import { type MachinePaths, machinePaths } from './paths.ts';

export interface Launch {
  id: string;
  name: string;
  spec: VmSpec;
  accelerator: Accelerator;
  /** Sockets and logs of this VM. */
  directory: string;
  /** The VM's qcow2 disk: a path, or a URL as in `disk-node.ts`. */
  diskFile: string;
  /** It is on storage that other hosts have too, so this host must not keep bytes of it in its own memory. */
  sharedDisk?: boolean;
  /** Where the daemon serves what lies under the disk, as long as not all of that is here; see `arriving-disk.ts`. */
  belowSocket?: string;
  /** Raw ISO with first-boot facts. */
  seedFile?: string;
  /** By interface: the tap device, or `null` for QEMU's own user network. Missing means `null`. */
  taps?: readonly (string | null)[];
  /** Wait for memory and device state (`migrate-incoming`) instead of booting. */
  incoming?: boolean;
  /** Has a monitor that a later daemon reaches also while a page is waited for; see `spare-monitor.ts`. */
  spareMonitor?: boolean;
}

export const maxNets = 8;
/** Root ports that are empty at start, for devices that come later. */
export const hotplugPorts = ['hotplug0', 'hotplug1', 'hotplug2', 'hotplug3'] as const;
export const nodeNames = {
  disk: 'disk',
  diskFile: 'disk-file',
  seed: 'seed',
  // Of a disk that is still on its way: the daemon's export, then what that had of it, and the image.
  source: 'disk-source',
  below: 'disk-below',
  image: 'disk-image',
} as const;

export const netdevId = (index: number): string => `net${index}`;
export const nicId = (index: number): string => `nic${index}`;

/** The arguments for `qemu-system-x86_64`, without the program itself. */
export function qemuArgv(launch: Launch): string[] {
  const { spec, id, name } = launch;
  const paths = machinePaths(launch.directory);
  return [
    ...['-name', `guest=${escapeCommas(name)},process=${escapeCommas(`viper-${name}`)},debug-threads=on`],
    ...['-uuid', id],
    ...['-no-user-config', '-nodefaults', '-display', 'none'],
    ...['-msg', 'timestamp=on'],
    // QEMU opens files and sockets and nothing more: no new programs, no other users, no scheduling changes.
    ...['-sandbox', 'on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny'],
    ...machineArguments(spec, launch.accelerator),
    // The daemon lets the VM run, when everything around it is ready.
    '-S',
    // A guest that shuts down leaves a paused QEMU that still knows it, in case the daemon is away at that moment.
    ...['-action', 'shutdown=pause'],
    ...(launch.incoming ? ['-incoming', 'defer'] : []),
    ...monitorArguments(paths, launch.spareMonitor === true),
    ...diskArguments(launch),
    ...serialArguments(paths),
    ...netArguments(spec, launch.taps ?? []),
    ...device({
      driver: 'virtio-rng-pci',
      id: 'rng',
      rng: 'rng-source',
      'disable-legacy': 'on',
      ...slot(0x05),
    }),
    // Present for later ballooning. Free page reporting would give pages back behind a migration's back.
    ...device({
      driver: 'virtio-balloon-pci',
      id: 'balloon',
      'deflate-on-oom': true,
      'free-page-reporting': false,
      'disable-legacy': 'on',
      ...slot(0x06),
    }),
    // A guest that finds another number here than before knows that it is a copy, and renews its randomness. It is
    // the VM's id, so it stays through a migration and changes in a clone.
    ...device({ driver: 'vmgenid', id: 'generation', guid: id }),
    ...hotplugPorts.flatMap((port, index) =>
      device({
        driver: 'pcie-root-port',
        id: port,
        chassis: index + 1,
        slot: index + 1,
        bus: 'pcie.0',
        addr: `0x1c.0x${index}`,
        multifunction: index === 0,
      }),
    ),
  ];
}

function machineArguments(spec: VmSpec, accelerator: Accelerator): string[] {
  const { model, count } = spec.cpu;
  return [
    // Controllers that no guest of ours uses only cost boot time and migration state.
    ...['-machine', `${escapeCommas(spec.machine)},usb=off,vmport=off,smm=off,sata=off,dump-guest-core=off`],
    // The default translation cache is up to 1 GiB for each VM, which no count of the host's memory would see.
    ...['-accel', accelerator === 'tcg' ? 'tcg,thread=multi,tb-size=256' : 'kvm'],
    // Under KVM a feature that the host lacks must be an error now, not a guest that dies after a migration. TCG
    // lacks features of nearly every model and masks them the same way on each host of one QEMU version.
    ...['-cpu', accelerator === 'kvm' ? `${escapeCommas(model)},enforce=on` : escapeCommas(model)],
    ...['-m', `size=${spec.memoryBytes / 1024}K`],
    ...['-smp', `cpus=${count},maxcpus=${count},sockets=1,cores=${count},threads=1`],
    ...['-rtc', 'base=utc'],
    ...['-boot', 'strict=on'],
    // A sleeping guest answers nobody and cannot be told from a dead one.
    ...['-global', 'ICH9-LPC.disable_s3=1', '-global', 'ICH9-LPC.disable_s4=1'],
    ...json('-object', { 'qom-type': 'rng-builtin', id: 'rng-source' }),
  ];
}

const monitorArguments = (paths: MachinePaths, hasSpare: boolean): string[] => [
  ...['-chardev', `${socketChardev('qmp', paths.qmp)}`],
  ...['-mon', 'chardev=qmp,mode=control'],
  ...(hasSpare
    ? [
        ...['-chardev', `pipe,id=spare,path=${escapeCommas(paths.spare)}`],
        ...['-mon', 'chardev=spare,mode=control'],
      ]
    : []),
];

/**
 * The host's page cache is used (`direct` off): the VMs of a site share one base image, which then is in memory
 * once, and O_DIRECT does not work on every filesystem. Guests' flushes are honoured, and QEMU itself drops its
 * cached blocks when it takes over a disk that another host wrote.
 */
const cache = { direct: false, 'no-flush': false };

/** What the guest discards or fills with zeros takes no space, and nothing to migrate. */
export const ownDiskNode = {
  driver: 'qcow2',
  'node-name': nodeNames.disk,
  file: nodeNames.diskFile,
  discard: 'unmap',
  'detect-zeroes': 'unmap',
  cache,
};

/** A daemon that is away is waited for; after this the guest stands still (`rerror`), until it is told to go on. */
const reconnectS = 3600;

/** The name under which the daemon exports what lies under a disk. */
export const belowExport = 'disk';

function diskArguments(launch: Launch): string[] {
  const { disk, diskFile, seed, source } = nodeNames;
  const { seedFile, belowSocket } = launch;
  return [
    ...json('-blockdev', {
      ...diskNode(launch.diskFile),
      'node-name': diskFile,
      discard: 'unmap',
      cache: { ...cache, direct: launch.sharedDisk === true && !isRemote(launch.diskFile) },
    }),
    ...(belowSocket === undefined
      ? []
      : json('-blockdev', {
          driver: 'nbd',
          'node-name': source,
          server: { type: 'unix', path: belowSocket },
          export: belowExport,
          'read-only': true,
          'reconnect-delay': reconnectS,
        })),
    ...json('-blockdev', belowSocket === undefined ? ownDiskNode : { ...ownDiskNode, backing: source }),
    // A guest that is told of an error gives its file system up; one that stands still goes on when that is mended.
    ...blockDevice({
      id: 'disk0',
      drive: disk,
      serial: 'viper-disk',
      werror: 'stop',
      rerror: 'stop',
      bootindex: 0,
      ...slot(0x02),
    }),
    ...(seedFile === undefined
      ? []
      : [
          ...json('-blockdev', {
            driver: 'raw',
            'node-name': seed,
            'read-only': true,
            file: { driver: 'file', 'node-name': `${seed}-file`, filename: seedFile, 'read-only': true },
          }),
          ...blockDevice({ id: 'disk1', drive: seed, serial: 'viper-seed', ...slot(0x03) }),
        ]),
  ];
}

const blockDevice = (properties: object): string[] =>
  device({ driver: 'virtio-blk-pci', 'write-cache': 'on', 'disable-legacy': 'on', ...properties });

const serialArguments = (paths: MachinePaths): string[] => [
  ...['-chardev', socketChardev('agent', paths.agent)],
  ...device({ driver: 'virtio-serial-pci', id: 'serial', 'disable-legacy': 'on', ...slot(0x04) }),
  ...device({
    driver: 'virtserialport',
    bus: 'serial.0',
    nr: 1,
    chardev: 'agent',
    id: 'agent0',
    name: 'org.qemu.guest_agent.0',
  }),
  ...[
    '-chardev',
    `${socketChardev('console', paths.console)},logfile=${escapeCommas(paths.consoleLog)},logappend=on`,
  ],
  ...device({ driver: 'isa-serial', id: 'console0', chardev: 'console', index: 0 }),
];

function netArguments(spec: VmSpec, taps: readonly (string | null)[]): string[] {
  return spec.nets.flatMap(({ mac }, index) => [
    ...json('-netdev', netdev(netdevId(index), taps[index] ?? null)),
    ...device({
      driver: 'virtio-net-pci',
      id: nicId(index),
      netdev: netdevId(index),
      mac,
      // The boot ROM is a file of the host's distribution, whose size would have to match on the other side.
      romfile: '',
      'disable-legacy': 'on',
      ...slot(0x10 + index),
    }),
  ]);
}

function netdev(id: string, tap: string | null): object {
  if (tap === null) return { type: 'user', id };
  return { type: 'tap', id, ifname: tap, script: 'no', downscript: 'no' };
}

const slot = (number: number) => ({ bus: 'pcie.0', addr: `0x${number.toString(16).padStart(2, '0')}` });

const socketChardev = (id: string, path: string): string =>
  `socket,id=${id},path=${escapeCommas(path)},server=on,wait=off`;

const json = (option: string, value: object): string[] => [option, JSON.stringify(value)];
const device = (properties: object): string[] => json('-device', properties);

const escapeCommas = (value: string): string => value.replaceAll(',', ',,');
