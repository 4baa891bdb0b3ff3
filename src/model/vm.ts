/** What a VM is, as plain data. A spec pins everything that another host must match to take the VM over. */
import type { ImageDigest, Uuid } from './ids.ts';
import type { VmState } from './states.ts';

export type Accelerator = 'kvm' | 'tcg';

export interface NetSpec {
  /** Name of a network of the cloudlet (`user` is always there: outbound only, through QEMU itself). */
  network: string;
  mac: string;
}

/** First-boot facts for the guest: cloud-init's NoCloud seed, and `viper.env` for guests without cloud-init. */
export interface SeedSpec {
  hostname: string;
  sshKeys: string[];
  /** Static addresses by interface, in the order of `nets`; none means DHCP. */
  addresses: { mac: string; address: string; gateway?: string }[];
  /** MACs of interfaces that stay without an address until a handoff needs them. */
  waiting?: string[];
  /** Raw cloud-init user data that replaces the one made from the fields above. */
  userData?: string;
}

export interface VmSpec {
  /** Versioned machine type, such as `pc-q35-7.2`: an alias would differ between hosts. */
  machine: string;
  /** What was asked for; the accelerator in use is a fact of the running VM. */
  accelerator: Accelerator | 'auto';
  /** Named CPU model (never `host` or `max`) and number of vCPUs. */
  cpu: { model: string; count: number };
  memoryBytes: number;
  /**
   * `image` is what it was made from. `storage` names the storage of the cloudlet on which it is, for other cloudlets
   * to open it too; it then holds all that it needs. Missing: an overlay on the image, in the cloudlet's own directory.
   */
  disk: { image: ImageDigest; sizeBytes: number; storage?: string };
  nets: NetSpec[];
  seed: SeedSpec;
}

/**
 * Storage that other cloudlets have as well, under the same name: a directory of the host (on NFS, CephFS, a cluster
 * file system), or a server that QEMU speaks to itself.
 */
export type Storage = { name: string; path: string } | { name: string; url: string };

/**
 * How the connections of a VM's clients outlive a move. `mptcp`: the address changes, and MPTCP carries its connections
 * over. `stretch`: the LAN is stretched to the VM, which keeps its address. `host-route`: it keeps its address, too, and
 * a route to that one address follows it. `none`: the address changes, and whoever cares is told by an event.
 */
export const continuities = ['mptcp', 'stretch', 'host-route', 'none'] as const;
export type Continuity = (typeof continuities)[number];

/** Where in a network an interface is at home. IPv4. */
export interface Place {
  /** With prefix length: `10.4.0.10/24`. */
  address: string;
  /** `10.4.0.0/24` */
  subnet: string;
  gateway: string;
}

/** Which interfaces of a VM have an address of the cloudlet's, and which. */
export interface Attachment {
  /** Index in `nets` of the interface that serves. */
  serving: number;
  /** Index of the one that waits for the next network, in a VM that has two. */
  waiting?: number;
  place: Place;
  /** The cloudlet in whose LAN the place is, while the VM keeps its address elsewhere. */
  home?: { cloudletId: Uuid; name: string };
}

export interface InstanceType {
  name: string;
  cpus: number;
  memoryBytes: number;
  diskBytes: number;
  /** Networks to join, one interface each. */
  nets: string[];
}

/** Why QEMU is not running any more. */
export interface VmExit {
  reason: 'shutdown' | 'forced' | 'crashed';
  at: string;
  detail: string;
}

/** How the daemon finds a QEMU again: pids are reused, the start time tells them apart. */
export interface ProcessRef {
  pid: number;
  /** Field 22 of /proc/PID/stat, in clock ticks since boot. */
  startTicks: number;
}

export interface VmRecord {
  id: Uuid;
  name: string;
  state: VmState;
  spec: VmSpec;
  createdAt: string;
  /** What its first disk and memory came from, if not from the image alone. */
  origin?: { kind: 'clone'; vmId: Uuid } | { kind: 'snapshot'; snapshotId: Uuid };
  process?: ProcessRef;
  /** In use while the VM runs. */
  runningWith?: Accelerator;
  lastExit?: VmExit;
  /** Rises with each change of owner; a VM that never moved has none and counts as 1. */
  epoch?: number;
  /** Missing when the cloudlet gave it no address. */
  attachment?: Attachment;
  /** What a migration of it does about connections unless it is asked otherwise. */
  continuity?: Continuity;
  /** For whom it runs. Only VMs of one tenant share memory on their way; missing: nobody knows, and it shares with none. */
  tenant?: string;
}

/** A golden snapshot: an image plus the RAM of a VM just booted from it. */
export interface SnapshotRecord {
  id: Uuid;
  name: string;
  /** The spec of the template VM; a VM started from the snapshot has the same hardware. */
  spec: VmSpec;
  createdAt: string;
  memoryFileBytes: number;
  diskFileBytes: number;
  /** From power-on to a guest agent that answers, as measured when it was made. */
  bootMs: number;
  /** Of its memory's file; missing in records of older daemons. The disk's names the image as it is called here. */
  digest?: string;
}

/**
 * The index of an image's blocks, with which a migration sends a reference instead of what the image has. It is made
 * in the background; `waiting`: not begun.
 */
export type ImageIndexView =
  | { state: 'waiting' }
  | { state: 'building'; doneBytes: number; totalBytes: number }
  /** Distinct blocks of 4 KiB that are not zero, and the size of the index's file. */
  | { state: 'ready'; blocks: number; fileBytes: number }
  | { state: 'failed'; message: string };

export interface ImageRecord {
  digest: ImageDigest;
  aliases: string[];
  format: 'qcow2' | 'raw';
  /** Bytes of the file, which the digest is over. */
  fileBytes: number;
  /** Size of the disk that a guest sees. */
  virtualBytes: number;
  createdAt: string;
}
