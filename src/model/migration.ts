/** A migration as plain data: what is asked for, how far it is, and what it came to. Units stand last in names. */
import type { ErrorCode, ErrorDetails } from './errors.ts';
import type { ImageDigest, Uuid } from './ids.ts';
import type { Attachment, Continuity, VmSpec } from './vm.ts';

/** `auto` is pre-copy as long as rounds shrink the work, and post-copy when they do not. */
export const migrationModes = ['precopy', 'postcopy', 'hybrid', 'auto'] as const;
export type MigrationMode = (typeof migrationModes)[number];

/**
 * How memory travels. `direct`: from QEMU to QEMU as it is. `condensed`: through agents that send only what the other
 * side cannot already know. `relayed`: condensed, and what the destination does not take as fast as the source gives it
 * goes to other cloudlets, from which the destination fetches it: the source is free before it is done.
 */
export const migrationEngines = ['direct', 'condensed', 'relayed'] as const;
export type MigrationEngine = (typeof migrationEngines)[number];

/** In the order in which a migration passes them; `postcopy` and `merge` (at a destination alone) where it has them. */
export const migrationPhases = [
  'preflight',
  'image',
  'disk',
  'memory',
  'switchover',
  'postcopy',
  'merge',
  'done',
] as const;
export type MigrationPhase = (typeof migrationPhases)[number];

/** Can be changed while it runs. */
export interface MigrationLimits {
  /** The longest pause of the guest that pre-copy may plan for. */
  downtimeMs: number;
  /** Memory and disk together; missing means as fast as the link takes it. */
  bandwidthBps?: number;
  /** Slow the guest down when it dirties its memory faster than the link carries it. */
  autoConverge: boolean;
  /** Nothing is sent for now. Ends by itself when the VM stops for its switchover. */
  paused?: boolean;
}

export interface MigrationOptions {
  mode: MigrationMode;
  /** Missing in records of older daemons, and then `direct`. */
  engine?: MigrationEngine;
  /** `shared`: both sides open the same disk; `copied`: the destination gets a disk of its own. */
  storage: 'shared' | 'copied';
  limits: MigrationLimits;
  /** Parallel streams for memory besides the main one; 0 means none. Only with `precopy`. */
  channels: number;
  /** Only with the engine `relayed`. */
  relayed?: RelayedOptions;
}

export interface RelayedOptions {
  /** Cloudlets that lend memory, as they were when it began. */
  relays: { id: Uuid; name: string }[];
  /** How many of them hold each slab. */
  replicas: number;
  /**
   * None of them: is given all that it takes to go on with the VM, in case the destination is lost before it is whole.
   * For that all of its pages go to relays.
   */
  custodian?: { id: Uuid; name: string };
  /**
   * Cloudlets that lend disk space for a disk that is not shared, enough for all of it: then it goes to them. If missing, it
   * is mirrored to the destination before the memory.
   */
  diskRelays?: { id: Uuid; name: string }[];
}

/** How far it is. Phases follow their order; of `fraction`, `doneBytes` and `round` none ever falls. */
export interface MigrationProgress {
  phase: MigrationPhase;
  /** 0 to 1, for a bar. It stands still while the guest makes work faster than it is done. */
  fraction: number;
  /** Passes over dirty memory, from 1. */
  round: number;
  doneBytes: number;
  /** Grows while the guest writes. Never below `doneBytes`. */
  totalBytes: number;
  /** How fast the guest dirties its memory. */
  dirtyBps: number;
  /** How fast bytes leave. */
  rateBps: number;
  /** Missing as long as nobody can say. */
  etaMs?: number;
  /** Missing as long as nobody can say. */
  forecastDowntimeMs?: number;
}

/** What the condensed engine did, as its source counts it. */
export interface EngineStatistics {
  /** Pages by what was sent for them. `unchanged`: the guest wrote what was there, so nothing was. */
  pages: { zero: number; literal: number; set: number; copy: number; delta: number; unchanged: number };
  /** Content that went in, zero pages left out; and all that went over the link. */
  guestBytes: number;
  wireBytes: number;
  /** Pages that the destination could not make out of what was sent, and asked for again. */
  repairedPages: number;
  /** Pages that the guest asked for in post-copy. */
  requestedPages: number;
  /** Pages that were missing when the guest went over. */
  postcopyPages: number;
  /** Time of the source's threads by what they did. */
  cpuMs: { digest: number; lookup: number; encode: number; compress: number; read: number };
  /** Why the stream went over as it was. */
  fallback?: string;
}

/** What the relayed engine put on relays, as its source counts it. */
export interface DivisionStatistics {
  /** How many relays held each slab. */
  replicas: number;
  slabs: number;
  /** Pages that need no relay. */
  zeroPages: number;
  /** Pages with the content of others, which went once. */
  alikePages: number;
  /** Of these, those whose content another VM had put there that left at the same time. Missing where there are none. */
  borrowedPages?: number;
  /** Sealed bytes that each was given. */
  relays: { name: string; slabs: number; bytes: number }[];
}

/** What the relayed engine fetched from relays, as its destination counts it. */
export interface MergeStatistics {
  slabs: number;
  bytes: number;
  /** Page faults that a relay served, and how long they took. */
  faults: number;
  faultMedianMs?: number;
  faultP95Ms?: number;
  /** Slabs that were not what was given to the relay. */
  wrong: number;
  /** Asked for at a second relay, since the first failed or was slow. */
  refetched: number;
}

/** What a migration cost one of its two sides while it ran. */
export interface MigrationCost {
  /** CPU time of the daemon, whatever else it did then. */
  daemonCpuMs: number;
  /** CPU time of QEMU beside its vCPUs. */
  qemuCpuMs: number;
  /** The most bytes that were on disk because of it. */
  diskBytes: number;
}

/** What its sessions of disk and memory put on the link, and how fast that has shown to be. */
export interface LinkUse {
  sentBytes: number;
  /** Once more, after cuts. */
  resentBytes: number;
  receivedBytes: number;
  reconnects: number;
  /** The fastest that bytes have arrived. */
  rateBps: number;
  rttMs?: number;
}

/** The share of the time that the guest's vCPUs ran, all together: 100 for one that is always busy. */
export interface GuestShare {
  /** While the destination was being prepared. */
  beforePercent: number;
  /** From then to the end, its pause counted in. A guest that has less to do has less, too. */
  duringPercent: number;
}

/** What was measured, when it is over. */
export interface MigrationResult {
  /** From the request to: destination complete, source released. */
  totalMs: number;
  /** Missing when it ended before the switchover. */
  downtimeMs?: number;
  /** By QEMU's own count, where it has one. */
  qemuDowntimeMs?: number;
  setupMs: number;
  /** How long each phase took that it came to; the switchover ends when the VM runs at the destination. */
  phaseMs?: Partial<Record<MigrationPhase, number>>;
  rounds: number;
  memoryBytes: number;
  diskBytes: number;
  zeroPages: number;
  /** How fast the guest dirtied its memory on average, and at the most. 0 for one whose memory went in one pass. */
  dirtyBps: number;
  maxDirtyBps: number;
  /** Memory and disk over the whole time. */
  rateBps: number;
  /** The most by which auto-converge slowed the guest. */
  throttlePercent: number;
  /** Post-copy only: page faults that went over the link. */
  pageRequests: number;
  finishedAs: 'precopy' | 'postcopy';
  condensed?: EngineStatistics;
  /** From the request to the moment at which the source held nothing of the VM any more. */
  exitMs?: number;
  relayed?: DivisionStatistics;
  /** What the destination fetched from relays: known when the VM is whole, which is after the exit. */
  merge?: MergeStatistics;
  /** The base image, where it went first. */
  imageBytes?: number;
  link?: LinkUse;
  /** Share of the link's best rate that was used over the whole time. */
  linkUsePercent?: number;
  guest?: GuestShare;
  source?: MigrationCost;
  destination?: MigrationCost;
}

/** Why a migration did not move the VM. The VM is where it was. */
export interface MigrationFailure {
  code: ErrorCode;
  message: string;
  details: ErrorDetails;
}

/** What the destination has to know of a VM to take it in. */
export interface VmToMove {
  id: Uuid;
  name: string;
  spec: VmSpec;
  /** The owner's present epoch; the destination will own the next one. */
  epoch: number;
  runningWith: 'kvm' | 'tcg';
  /** Whether its vCPUs run; a paused VM arrives paused. */
  running: boolean;
  image: { digest: ImageDigest; format: 'qcow2' | 'raw'; fileBytes: number; virtualBytes: number };
  /** Bytes of the overlay, holes left out. */
  diskBytes: number;
  /** Its disk at the source stands on no image: to copy it is to copy all of it. */
  wholeDisk?: boolean;
  /** As it is at the source. */
  attachment?: Attachment;
  continuity?: Continuity;
  tenant?: string;
}
