/** Migrations: what is asked for, what two daemons say to each other, how far it is and what it came to. */
import { Type } from 'typebox';
import { migrationEngines, migrationModes, migrationPhases } from '../../model/migration.ts';
import { BandwidthBps, Body, Bytes, Digest, Exact, Name, OneOf, Page, Time, Uuid } from './basics.ts';
import { Attachment, Continuity } from './networks.ts';
import { Tenant, VmSpec } from './vms.ts';

const Bps = Type.Number({ minimum: 0 });
export const Limits = Exact({
  downtimeMs: Type.Integer({
    minimum: 1,
    maximum: 60_000,
    description: 'The pause that pre-copy may plan for.',
  }),
  bandwidthBps: Type.Optional(BandwidthBps),
  autoConverge: Type.Boolean({
    description: 'Slow the guest down if it writes faster than the link carries.',
  }),
  paused: Type.Optional(
    Type.Boolean({
      description:
        'Send nothing for now. Not once the VM stands still for its switchover, which ends it, too.',
    }),
  ),
});
export const MigrationOptions = Exact({
  mode: OneOf(migrationModes, '`auto`: pre-copy while rounds shrink the work, post-copy when they do not.'),
  engine: Type.Optional(
    OneOf(
      migrationEngines,
      'How memory travels: as QEMU writes it, or without what the other side can know.',
    ),
  ),
  storage: OneOf(['shared', 'copied']),
  limits: Limits,
  channels: Type.Integer({ minimum: 0, maximum: 16 }),
  relayed: Type.Optional(
    Exact({
      relays: Type.Array(Exact({ id: Uuid, name: Name }), { maxItems: 32 }),
      replicas: Type.Integer({ minimum: 1, maximum: 4 }),
      custodian: Type.Optional(Exact({ id: Uuid, name: Name })),
      diskRelays: Type.Optional(
        Type.Array(Exact({ id: Uuid, name: Name }), {
          maxItems: 32,
          description: 'They hold the disk; if missing, it is mirrored to the destination first.',
        }),
      ),
    }),
  ),
});
export const MigrateVm = Body(
  { to: 'edge2' },
  {
    to: Type.String({ pattern: '^[a-z0-9][a-z0-9-]{0,62}$', description: 'Name or id of a peer.' }),
    mode: Type.Optional(
      OneOf(
        migrationModes,
        'Of the engine if missing: `auto` if condensed and the destination can do post-copy, `postcopy` if relayed, else `precopy`.',
      ),
    ),
    storage: Type.Optional(
      OneOf(
        ['auto', 'shared', 'copied'],
        '`shared`: only memory moves, both sides open the disk; `copied`: the disk moves, too; `auto` (default): ' +
          '`shared` where both sides have the storage that the disk is on.',
      ),
    ),
    channels: Type.Optional(
      Type.Integer({
        minimum: 0,
        maximum: 16,
        default: 0,
        description: 'Parallel streams of memory besides the main one; `precopy` only.',
      }),
    ),
    engine: Type.Optional(
      OneOf(
        [...migrationEngines, 'auto'],
        '`auto` (default): condensed, unless the link is too fast for it; relayed where the destination takes far less ' +
          'than can leave and others lend memory; the plan says why. `relayed`: the source is free when other cloudlets ' +
          'hold what the destination has not taken yet.',
      ),
    ),
    relays: Type.Optional(
      Type.Array(Type.String({ pattern: '^[a-z0-9][a-z0-9-]{0,62}$' }), {
        minItems: 1,
        maxItems: 32,
        description:
          'With `relayed`: names or ids of the peers that may hold memory, and a disk that is not shared; all that lend some if absent.',
      }),
    ),
    replicas: Type.Optional(
      Type.Integer({
        minimum: 1,
        maximum: 4,
        default: 2,
        description: 'With `relayed`: how many peers hold each part.',
      }),
    ),
    custodian: Type.Optional(
      Type.String({
        pattern: '^[a-z0-9][a-z0-9-]{0,62}$',
        description:
          'Name or id of a third peer that may go on with the VM, if the destination is lost before the VM is whole. ' +
          'Wants a disk on shared storage, and the engine `relayed`.',
      }),
    ),
    continuity: Type.Optional(Continuity),
    device: Type.Optional(
      Type.String({
        format: 'ipv4',
        description: "The address of the VM's device at the destination, if known.",
      }),
    ),
    limits: Type.Optional(
      Exact({
        downtimeMs: Type.Optional(Limits.properties.downtimeMs),
        bandwidthBps: Type.Optional(BandwidthBps),
        autoConverge: Type.Optional(Type.Boolean()),
      }),
    ),
  },
);
export const ClaimVm = Exact({
  reason: Type.String({
    minLength: 3,
    maxLength: 500,
    pattern: '^[^\\u0000-\\u001f]*$',
    description: 'For the audit.',
  }),
});
const Problem = Exact({
  field: Type.String({ maxLength: 200 }),
  value: Type.Unknown(),
  wanted: Type.Unknown(),
  message: Type.String({ maxLength: 2000 }),
});
const MigratingImage = Exact({
  digest: Digest,
  format: OneOf(['qcow2', 'raw']),
  fileBytes: Bytes,
  virtualBytes: Bytes,
});
/** What the destination has to know of a VM to take it in. */
export const VmToMove = Exact({
  id: Uuid,
  name: Name,
  spec: VmSpec,
  running: Type.Boolean(),
  epoch: Type.Integer({ minimum: 1 }),
  runningWith: OneOf(['kvm', 'tcg']),
  image: MigratingImage,
  diskBytes: Bytes,
  wholeDisk: Type.Optional(Type.Boolean({ description: 'At the source it stands on no image.' })),
  attachment: Type.Optional(Attachment),
  continuity: Type.Optional(Continuity),
  tenant: Type.Optional(Tenant),
});
/** What the custodian of a VM has to know of it. */
export const EscrowFacts = Exact({
  vm: VmToMove,
  epoch: Type.Integer({ minimum: 1 }),
  diskMark: Type.String({ pattern: '^viper-[0-9a-f-]{36}$' }),
});
export const EscrowOwner = Exact({
  claimed: Type.Boolean({ description: 'The custodian runs the VM, by this epoch, or is about to.' }),
  epoch: Type.Optional(Type.Integer({ minimum: 1 })),
});
export const Escrow = Exact({
  migrationId: Uuid,
  vm: Exact({ id: Uuid, name: Name }),
  from: Exact({ id: Uuid, name: Type.String({ description: 'The destination, which runs the VM.' }) }),
  memoryBytes: Bytes,
  state: OneOf(
    ['held', 'claimed', 'run'],
    '`held`: it may be claimed; `claimed`: it is ours, and has not run yet; `run`: it has.',
  ),
  createdAt: Time,
});
export const EscrowList = Exact({ items: Type.Array(Escrow) });
export const ClaimEscrow = Body(
  { vm: 'web', reason: 'edge2 burnt down' },
  {
    vm: Type.String({ maxLength: 64, description: 'Its name or id, so that a wrong migration is noticed.' }),
    reason: ClaimVm.properties.reason,
  },
);
export const CheckMigration = Exact({
  vm: VmToMove,
  options: MigrationOptions,
  qemuVersion: Type.String({ maxLength: 40 }),
  missingCpuFeatures: Type.Optional(
    Type.Array(Type.String({ maxLength: 40 }), {
      maxItems: 1000,
      description: "What the VM's CPU model has and the VM has not, for want of it at the source.",
    }),
  ),
  sentAt: Time,
});
export const MigrationCheck = Exact({
  problems: Type.Array(Problem),
  hasImage: Type.Boolean({ description: 'Else the source sends the base image first.' }),
  canPostcopy: Type.Optional(
    Type.Boolean({ description: 'Its QEMU can fetch pages when the guest asks for them.' }),
  ),
  sets: Type.Optional(
    Type.Array(Type.String(), {
      description: 'What is there of the VM that need not travel; see src/pages.',
    }),
  ),
});
const Ticket = Exact({ secret: Type.String({ maxLength: 200 }), expiresAt: Time });
const MigrationCost = Exact({
  daemonCpuMs: Type.Number({ description: 'Of the daemon, whatever else it did then.' }),
  qemuCpuMs: Type.Number({ description: 'Of QEMU beside its vCPUs.' }),
  diskBytes: Type.Integer({ minimum: 0, description: 'The most that was on disk because of it.' }),
});
const Amount = Type.Integer({ minimum: 0 });
/** What a destination fetched from relays. */
const MergeStatistics = Exact({
  slabs: Amount,
  bytes: Bytes,
  faults: Type.Integer({ minimum: 0, description: 'Page faults that a relay served.' }),
  faultMedianMs: Type.Optional(Type.Number()),
  faultP95Ms: Type.Optional(Type.Number()),
  wrong: Type.Integer({ minimum: 0, description: 'Slabs that were not what was given to the relay.' }),
  refetched: Type.Integer({ minimum: 0, description: 'Asked for at another relay, too.' }),
});
/** What two daemons say to each other about one migration; see src/migration/protocol.ts. */
export const MigrationMessage = Type.Union([
  Exact({ name: Type.Literal('prepare'), vm: VmToMove, options: MigrationOptions }),
  Exact({ name: Type.Literal('commit'), epoch: Type.Integer() }),
  Exact({ name: Type.Literal('abort'), epoch: Type.Integer() }),
  Exact({ name: OneOf(['pages-lost', 'sessions-lost', 'done', 'gone', 'ask', 'unknown']) }),
  Exact({
    name: Type.Literal('prepared'),
    ticket: Ticket,
  }),
  Exact({ name: Type.Literal('recover'), ticket: Ticket }),
  Exact({ name: Type.Literal('refused'), problems: Type.Array(Problem, { maxItems: 100 }) }),
  Exact({ name: Type.Literal('committed'), epoch: Type.Integer() }),
  Exact({
    name: Type.Literal('running'),
    epoch: Type.Integer(),
    complete: Type.Boolean(),
    divided: Type.Optional(Type.Boolean()),
    cost: Type.Optional(MigrationCost),
  }),
  Exact({ name: Type.Literal('merged'), merge: MergeStatistics, cost: Type.Optional(MigrationCost) }),
  Exact({ name: Type.Literal('rejected'), reason: Type.String({ maxLength: 10_000 }) }),
]);

export const MigrationProgress = Exact({
  phase: OneOf(migrationPhases),
  round: Type.Integer(),
  doneBytes: Bytes,
  totalBytes: Bytes,
  dirtyBps: Bps,
  rateBps: Bps,
  etaMs: Type.Optional(Type.Number()),
  forecastDowntimeMs: Type.Optional(Type.Number()),
});
const Count = Type.Integer({ minimum: 0 });
/** What the condensed engine did, as its source counts it; see model/migration.ts. */
const EngineStatistics = Exact({
  pages: Exact({
    zero: Count,
    literal: Count,
    set: Count,
    copy: Count,
    delta: Count,
    unchanged: Count,
  }),
  guestBytes: Bytes,
  wireBytes: Bytes,
  repairedPages: Count,
  requestedPages: Count,
  postcopyPages: Count,
  cpuMs: Exact({
    digest: Type.Number(),
    lookup: Type.Number(),
    encode: Type.Number(),
    compress: Type.Number(),
    read: Type.Number(),
  }),
  fallback: Type.Optional(Type.String({ description: 'Why it could do less than it can.' })),
});
const DivisionStatistics = Exact({
  replicas: Count,
  slabs: Count,
  zeroPages: Count,
  alikePages: Type.Integer({ description: 'Pages with the content of others, which went once.' }),
  borrowedPages: Type.Optional(
    Type.Integer({ description: 'Those of them whose content another VM had put there, on its way, too.' }),
  ),
  relays: Type.Array(Exact({ name: Type.String(), slabs: Count, bytes: Bytes })),
});
const LinkUse = Exact({
  sentBytes: Bytes,
  resentBytes: Bytes,
  receivedBytes: Bytes,
  reconnects: Type.Integer(),
  rateBps: Type.Number({ minimum: 0, description: 'The fastest that bytes have arrived.' }),
  rttMs: Type.Optional(Type.Number()),
});
const GuestShare = Exact({
  beforePercent: Type.Number({ description: 'While the destination was being prepared.' }),
  duringPercent: Type.Number({ description: 'From then to the end, its pause counted in.' }),
});
export const MigrationResult = Exact({
  totalMs: Type.Number(),
  downtimeMs: Type.Optional(Type.Number()),
  qemuDowntimeMs: Type.Optional(Type.Number()),
  setupMs: Type.Number(),
  phaseMs: Type.Optional(
    Type.Record(Type.String(), Type.Number(), {
      description: 'How long each phase took. The switchover ends when the VM runs at the destination.',
    }),
  ),
  rounds: Type.Integer(),
  memoryBytes: Bytes,
  diskBytes: Bytes,
  zeroPages: Type.Integer(),
  dirtyBps: { ...Bps, description: 'On average.' },
  maxDirtyBps: Type.Optional(Bps),
  rateBps: Bps,
  throttlePercent: Type.Number(),
  pageRequests: Type.Integer(),
  finishedAs: OneOf(['precopy', 'postcopy']),
  condensed: Type.Optional(EngineStatistics),
  exitMs: Type.Optional(
    Type.Number({ description: 'From the request to when the source held nothing of the VM any more.' }),
  ),
  relayed: Type.Optional(DivisionStatistics),
  merge: Type.Optional(MergeStatistics),
  imageBytes: Type.Optional(Bytes),
  link: Type.Optional(LinkUse),
  linkUsePercent: Type.Optional(
    Type.Number({ description: "Share of the link's best rate that was used over the whole time." }),
  ),
  guest: Type.Optional(GuestShare),
  source: Type.Optional(MigrationCost),
  destination: Type.Optional(MigrationCost),
});
export const Migration = Exact({
  id: Uuid,
  role: OneOf(['source', 'destination'], 'What this cloudlet is in it.'),
  vm: Exact({ id: Uuid, name: Name }),
  peer: Exact({ id: Uuid, name: Name }),
  options: MigrationOptions,
  state: Type.String({ description: 'Of the state machine; see docs/architecture.md.' }),
  over: Type.Boolean(),
  progress: Type.Optional(MigrationProgress),
  result: Type.Optional(MigrationResult),
  failure: Type.Optional(
    Exact({ code: Type.String(), message: Type.String(), problems: Type.Optional(Type.Array(Problem)) }),
  ),
  attention: Type.Optional(
    Type.String({ description: 'What does not go on by itself, and what an operator can do about it.' }),
  ),
  createdAt: Time,
  finishedAt: Type.Optional(Time),
});
export const MigrationPage = Page(Migration);
export const MigrationPlan = Exact({
  problems: Type.Array(Problem),
  engine: Type.Optional(
    Exact({ engine: OneOf(migrationEngines), mode: OneOf(migrationModes), reason: Type.String() }),
  ),
  forecast: Type.Optional(
    Exact({
      totalMs: Type.Number(),
      downtimeMs: Type.Number(),
      bytes: Bytes,
      converges: Type.Boolean(),
      inputs: Type.Record(Type.String(), Type.Number()),
    }),
  ),
});
