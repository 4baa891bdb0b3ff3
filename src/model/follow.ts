/** Following a device, as plain data: what was observed, what was decided and why. Units stand last in names. */
import type { Uuid } from './ids.ts';

/** Round trips to one host, as they were of late. */
export interface RttStats {
  /** Answers so far. */
  samples: number;
  /** Weighted mean, the newest counts one eighth (RFC 6298). */
  smoothedMs: number;
  /** Weighted mean deviation from it, the newest counts one fourth (RFC 6298). */
  variationMs: number;
  /** Weighted mean difference between one answer and the next (RFC 3550). */
  jitterMs: number;
  minMs: number;
  lastMs: number;
  /** Weighted share of probes without an answer, 0 to 1. */
  lossRatio: number;
  /** Probes without an answer since the last answer. */
  lostInRow: number;
  /** Of the last answer, in ms since 1970. */
  answeredAtMs: number;
}

/** `lost`: no sign of the device at all; `asked`: by a person, without anything having happened. */
export const triggerKinds = ['rtt', 'lan', 'lost', 'cpu', 'memory', 'asked'] as const;
export type TriggerKind = (typeof triggerKinds)[number];

export interface Trigger {
  kind: TriggerKind;
  message: string;
}

/** `fresh`: a new VM there and the end of the old one, as a migration would serve the user worse. */
export const decisionOutcomes = ['migrate', 'stay', 'fresh'] as const;
export type DecisionOutcome = (typeof decisionOutcomes)[number];

/** What a move to one cloudlet would cost. */
export interface HandoffForecast {
  totalMs: number;
  downtimeMs: number;
  bytes: number;
  /** How much the RTT to the device grows while the bytes travel. */
  deltaRttMs: number;
  /** What a fresh VM there would take until it serves. */
  serviceInitiationMs: number;
  /** Finished migrations that corrected the model; 0 is the model alone. */
  learnedFrom: number;
}

export interface Candidate {
  cloudletId: Uuid;
  name: string;
  /** Between the two cloudlets. */
  neighbourRttMs?: number;
  /** To the device, as the candidate says. */
  claimedRttMs?: number;
  /** To the device, as the device itself says. */
  reportedRttMs?: number;
  /** To the device, as it counts. */
  deviceRttMs?: number;
  /** The device is in its LAN. */
  seesDevice: boolean;
  /** Why it cannot take the VM; empty if it can. */
  problems: string[];
  forecast?: HandoffForecast;
  verdict: 'chosen' | 'possible' | 'excluded';
  why: string;
}

export interface DecisionPolicy {
  /** RTT between cloudlets from which on a peer is no neighbour. */
  neighbourRttMs: number;
  /** A candidate has to be nearer to the device by this much, and by `improvementRatio` of the present RTT. */
  improvementMs: number;
  improvementRatio: number;
  /** RTT during the migration up to which users notice nothing: then it is done, however long it takes. */
  crispRttMs: number;
  /** RTT during the migration beyond which it is not done at all. */
  annoyingRttMs: number;
}

export interface Decision {
  id: Uuid;
  at: string;
  vm: { id: Uuid; name: string };
  device?: { id: Uuid; name: string };
  trigger: Trigger;
  here: { cloudletId: Uuid; name: string; deviceRttMs?: number };
  candidates: Candidate[];
  outcome: DecisionOutcome;
  target?: { id: Uuid; name: string };
  /** In words, in the order in which they were found. */
  reasons: string[];
  policy: DecisionPolicy;
  /** From the trigger to the decision. */
  tookMs: number;
  /** Whether anything was done about it; a dry run never is stored. */
  acted: boolean;
  operationId?: Uuid;
  migrationId?: Uuid;
  /** What it came to, once it is over. */
  result?: { moved: boolean; message: string; totalMs?: number; downtimeMs?: number };
}

/** One finished migration, as the profile learns from it: what could be known before, and what it came to. */
export interface ProfileSample {
  migrationId: Uuid;
  at: string;
  /** The destination. */
  peerId: Uuid;
  /** Of the link and the engine: other ways of travel teach little about this one. */
  way: string;
  memoryBytes: number;
  diskBytes: number;
  dirtyBps: number;
  bandwidthBps: number;
  rttMs: number;
  /** By the analytic model. */
  modelTotalMs: number;
  modelDowntimeMs: number;
  totalMs: number;
  downtimeMs: number;
}

/** A mobile device, which a VM follows. */
export interface DeviceRecord {
  id: Uuid;
  name: string;
  createdAt: string;
  /** Its bearer token, among the credentials of this cloudlet. */
  credentialId: Uuid;
  /** Of its radios: a cloudlet recognises it by them in its own LAN. */
  macs: string[];
  /** IPv4 or IPv6, the one in use first. */
  addresses: string[];
  /** The VM that follows it. */
  vmId?: Uuid;
  /** Where that VM is, once it has left this cloudlet. */
  vmAt?: { cloudletId: Uuid; name: string; url: string };
  /** When it last told of itself. */
  reportedAt?: string;
}
