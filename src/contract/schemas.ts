/**
 * The shapes of the API, as JSON Schema with their TypeScript types. The daemon validates by them, the OpenAPI
 * document shows them, the SDK is typed by them. Sizes are bytes, times milliseconds, dates ISO 8601 in UTC.
 */
import { type Static, type TSchema, Type } from 'typebox';
import { errorCodes } from '../model/errors.ts';
import { digestPattern, macPattern, namePattern, uuidPattern } from '../model/ids.ts';
import { migrationModes, migrationPhases } from '../model/migration.ts';
import { operationStates, vmActions, vmStates } from '../model/states.ts';
import { GiB, MiB } from '../model/units.ts';

/** A JSON object with exactly these properties: unknown ones are refused, so that a typing slip is told. */
const Exact = <T extends Record<string, TSchema>>(properties: T) =>
  Type.Object(properties, { additionalProperties: false });

/** The body of a request, with an example that the docs page offers to send. */
const Body = <T extends Record<string, TSchema>>(example: Record<string, unknown>, properties: T) =>
  Type.Object(properties, { additionalProperties: false, examples: [example] });

/**
 * A string enumeration that stays readable in the document: `enum` instead of `anyOf` of constants.
 */
const OneOf = <const T extends readonly string[]>(values: T, description?: string) =>
  Type.Unsafe<T[number]>({ type: 'string', enum: [...values], ...(description ? { description } : {}) });

export const Uuid = Type.String({ pattern: uuidPattern, description: 'A UUID in lower case.' });
export const Digest = Type.String({
  pattern: digestPattern,
  description: 'SHA-256 of the bytes of the file.',
});
export const Name = Type.String({
  pattern: namePattern,
  description: 'A host name label: a-z, 0-9 and hyphens, at most 63 characters.',
});
/** What a path takes where an object has both a name and an id. */
export const Reference = Type.String({
  pattern: '^[a-z0-9][a-z0-9.:_-]{0,127}$',
  description: 'The id, digest, name or alias of the object.',
});
const Mac = Type.String({ pattern: macPattern, description: 'A MAC address in lower case with colons.' });
const Time = Type.String({ format: 'date-time' });
const Bytes = Type.Integer({ minimum: 0 });
const Fingerprint = Type.String({
  pattern: '^[0-9a-f]{64}$',
  description: 'SHA-256 of the certificate, hex.',
});
const HttpsUrl = Type.String({ pattern: '^https://[^\\s/?#@]{1,253}/?$', maxLength: 300 });

export const ErrorReply = Exact({
  error: Exact({
    code: OneOf(errorCodes),
    message: Type.String(),
    details: Type.Record(Type.String(), Type.Unknown()),
    requestId: Type.String(),
  }),
});

/** A page of a list: `next` goes into `after` of the following request; null ends the list. */
const Page = <T extends TSchema>(item: T) =>
  Exact({ items: Type.Array(item), next: Type.Union([Type.String(), Type.Null()]) });

export const PageQuery = {
  limit: Type.Optional(Type.Integer({ minimum: 1, maximum: 200, default: 50 })),
  after: Type.Optional(Type.String({ maxLength: 200, description: '`next` of the page before.' })),
};

// --- cloudlet

export const Health = Exact({
  status: OneOf(['ok']),
  cloudletId: Uuid,
  version: Type.String(),
});

export const Whoami = Exact({
  id: Type.String({ description: 'Of the token, or of the cloudlet.' }),
  name: Type.String(),
  scopes: Type.Array(OneOf(['admin', 'operate', 'read', 'device', 'peer'])),
});

export const InstanceType = Exact({
  name: Name,
  cpus: Type.Integer(),
  memoryBytes: Bytes,
  diskBytes: Bytes,
  nets: Type.Array(Type.String()),
});
export const InstanceTypeList = Exact({ items: Type.Array(InstanceType) });

export const Cloudlet = Exact({
  id: Uuid,
  name: Name,
  url: Type.String(),
  fleetId: Uuid,
  version: Type.String(),
  accelerator: OneOf(['kvm', 'tcg'], 'What `auto` means on this host.'),
  qemuVersion: Type.String(),
  cpus: Type.Integer(),
  memory: Exact({ totalBytes: Bytes, freeBytes: Bytes }),
  disk: Exact({ totalBytes: Bytes, freeBytes: Bytes }),
  networks: Type.Array(Exact({ name: Type.String(), kind: OneOf(['user', 'bridge']) })),
  draining: Type.Boolean({ description: 'Takes no VMs and gives its own away, until it is undrained.' }),
  vms: Exact({ total: Type.Integer(), running: Type.Integer() }),
});

// --- images

export const Image = Exact({
  digest: Digest,
  aliases: Type.Array(Name),
  format: OneOf(['qcow2', 'raw']),
  fileBytes: Bytes,
  virtualBytes: Bytes,
  createdAt: Time,
});
export const ImagePage = Page(Image);
export const ImportQuery = Exact({
  alias: Type.Optional(Name),
  digest: Type.Optional(Digest),
  format: Type.Optional(OneOf(['qcow2', 'raw'], 'Told from the bytes if absent.')),
});

// --- VMs

const CpuCount = Type.Integer({ minimum: 1, maximum: 64 });
const MemoryBytes = Type.Integer({ minimum: 64 * MiB, maximum: 1024 * GiB, multipleOf: MiB });
const DiskBytes = Type.Integer({ minimum: MiB, maximum: 16384 * GiB, multipleOf: 512 });
const PlainText = (maxLength: number) => Type.String({ maxLength, pattern: '^[^\\u0000-\\u001f]*$' });
const MachineType = Type.String({
  pattern: '^[a-z0-9.-]{1,40}$',
  description: 'Versioned, e.g. pc-q35-7.2.',
});
const CpuModel = Type.String({ pattern: '^[A-Za-z0-9._-]{1,40}$', description: 'A named QEMU CPU model.' });
const Address = Exact({
  mac: Mac,
  address: Type.String({
    pattern: '^[0-9a-fA-F:.]{2,39}/[0-9]{1,3}$',
    description: 'Address/prefix length.',
  }),
  gateway: Type.Optional(Type.String({ pattern: '^[0-9a-fA-F:.]{2,39}$' })),
});
const AcceleratorChoice = OneOf(['auto', 'kvm', 'tcg']);

/** Everything that a VM's hardware pins; see model/vm.ts. */
export const VmSpec = Exact({
  machine: MachineType,
  accelerator: AcceleratorChoice,
  cpu: Exact({ model: CpuModel, count: CpuCount }),
  memoryBytes: MemoryBytes,
  disk: Exact({ image: Digest, sizeBytes: DiskBytes }),
  nets: Type.Array(Exact({ network: Type.String(), mac: Mac })),
  seed: Exact({
    hostname: Name,
    sshKeys: Type.Array(Type.String()),
    addresses: Type.Array(Address),
    userData: Type.Optional(Type.String()),
  }),
});

/** What a caller may say about the hardware; the instance type gives the rest. */
export const Hardware = Exact({
  machine: Type.Optional(MachineType),
  accelerator: Type.Optional(AcceleratorChoice),
  cpu: Type.Optional(Exact({ model: Type.Optional(CpuModel), count: Type.Optional(CpuCount) })),
  memoryBytes: Type.Optional(MemoryBytes),
  diskBytes: Type.Optional(DiskBytes),
  nets: Type.Optional(
    Type.Array(Exact({ network: Type.String({ maxLength: 40 }), mac: Type.Optional(Mac) }), { maxItems: 8 }),
  ),
});
export const Seed = Exact({
  sshKeys: Type.Optional(Type.Array(PlainText(2000), { maxItems: 32 })),
  addresses: Type.Optional(Type.Array(Address, { maxItems: 8 })),
  userData: Type.Optional(Type.String({ maxLength: 65536, description: 'Raw cloud-init user data.' })),
});

export const CreateVm = Body(
  { name: 'web', image: 'tiny', instanceType: 'tiny' },
  {
    name: Name,
    image: Type.Optional(Reference),
    snapshot: Type.Optional(Reference),
    instanceType: Type.Optional(Name),
    hardware: Type.Optional(Hardware),
    seed: Type.Optional(Seed),
    start: Type.Optional(Type.Boolean({ default: true })),
  },
);

export const StopVm = Body(
  { graceMs: 30_000 },
  {
    force: Type.Optional(Type.Boolean({ default: false, description: 'Do not ask the guest first.' })),
    graceMs: Type.Optional(
      Type.Integer({ minimum: 0, maximum: 600_000, default: 30_000, description: 'Then it is forced.' }),
    ),
  },
);

export const CloneVm = Body(
  { name: 'web-2' },
  {
    name: Name,
    identity: Type.Optional(
      OneOf(
        ['new', 'keep'],
        '`new` (default): own MACs, host name and machine id; a running VM needs its agent.',
      ),
    ),
  },
);

const Exit = Exact({ reason: OneOf(['shutdown', 'forced', 'crashed']), at: Time, detail: Type.String() });
const Origin = Exact({
  kind: OneOf(['clone', 'snapshot']),
  vmId: Type.Optional(Uuid),
  snapshotId: Type.Optional(Uuid),
});

export const Vm = Exact({
  id: Uuid,
  name: Name,
  state: OneOf(vmStates),
  createdAt: Time,
  spec: VmSpec,
  origin: Type.Optional(Origin),
  pid: Type.Optional(Type.Integer()),
  runningWith: Type.Optional(OneOf(['kvm', 'tcg'])),
  lastExit: Type.Optional(Exit),
  epoch: Type.Optional(Type.Integer({ description: 'Rises with each change of owner.' })),
  operationId: Type.Optional(Uuid),
  allowedActions: Type.Array(OneOf(vmActions), { description: 'What can be asked of it now.' }),
});
/** What a list says of a VM; ask for the VM itself to see its spec. */
export const VmSummary = Exact({
  id: Uuid,
  name: Name,
  state: OneOf(vmStates),
  createdAt: Time,
  image: Digest,
  cpus: CpuCount,
  memoryBytes: MemoryBytes,
});
export const VmPage = Page(VmSummary);

/** What the guest says of itself; each part is missing if its agent does not tell it. */
export const Guest = Exact({
  hostname: Type.Optional(Type.String()),
  os: Type.Optional(
    Exact({
      id: Type.Optional(Type.String()),
      name: Type.Optional(Type.String()),
      version: Type.Optional(Type.String()),
    }),
  ),
  kernel: Type.Optional(Type.String()),
  interfaces: Type.Optional(
    Type.Array(
      Exact({
        name: Type.String(),
        mac: Type.Optional(Type.String()),
        addresses: Type.Array(Exact({ address: Type.String(), prefixLength: Type.Integer() })),
      }),
    ),
  ),
});

export const Exec = Body(
  { argv: ['uname', '-r'] },
  {
    argv: Type.Array(Type.String({ maxLength: 65536 }), { minItems: 1, maxItems: 256 }),
    input: Type.Optional(Type.String({ maxLength: 1024 * 1024, description: 'Standard input.' })),
    timeoutMs: Type.Optional(Type.Integer({ minimum: 1, maximum: 600_000, default: 30_000 })),
  },
);
export const ExecReply = Exact({
  exitCode: Type.Integer(),
  stdout: Type.String(),
  stderr: Type.String(),
  truncated: Type.Boolean(),
});

// --- golden snapshots

export const CreateSnapshot = Body(
  { name: 'golden', image: 'tiny', instanceType: 'tiny' },
  {
    name: Name,
    image: Reference,
    instanceType: Type.Optional(Name),
    hardware: Type.Optional(Hardware),
    readyTimeoutMs: Type.Optional(
      Type.Integer({ minimum: 1000, maximum: 900_000, default: 180_000, description: 'For the boot.' }),
    ),
  },
);
export const Snapshot = Exact({
  id: Uuid,
  name: Name,
  spec: VmSpec,
  createdAt: Time,
  memoryFileBytes: Bytes,
  diskFileBytes: Bytes,
  bootMs: Type.Number({ description: 'Power-on to a guest agent that answered, when it was made.' }),
});
export const SnapshotPage = Page(Snapshot);

// --- migrations

const Bps = Type.Number({ minimum: 0 });
export const Limits = Exact({
  downtimeMs: Type.Integer({
    minimum: 1,
    maximum: 60_000,
    description: 'The pause that pre-copy may plan for.',
  }),
  bandwidthBps: Type.Optional(Type.Integer({ minimum: 1_000_000, maximum: 1_000_000_000_000 })),
  autoConverge: Type.Boolean({
    description: 'Slow the guest down if it writes faster than the link carries.',
  }),
});
export const MigrationOptions = Exact({
  mode: OneOf(migrationModes, '`auto`: pre-copy while rounds shrink the work, post-copy when they do not.'),
  storage: OneOf(['shared', 'copied']),
  limits: Limits,
  channels: Type.Integer({ minimum: 0, maximum: 16 }),
});
export const MigrateVm = Body(
  { to: 'edge2' },
  {
    to: Type.String({ pattern: '^[a-z0-9][a-z0-9-]{0,62}$', description: 'Name or id of a peer.' }),
    mode: Type.Optional(OneOf(migrationModes)),
    limits: Type.Optional(
      Exact({
        downtimeMs: Type.Optional(Limits.properties.downtimeMs),
        bandwidthBps: Type.Optional(Type.Integer({ minimum: 1_000_000, maximum: 1_000_000_000_000 })),
        autoConverge: Type.Optional(Type.Boolean()),
      }),
    ),
  },
);
export const Drain = Body(
  { parallel: 2 },
  {
    to: Type.Optional(
      Type.Array(MigrateVm.properties.to, {
        minItems: 1,
        maxItems: 100,
        description: 'Peers; all if absent.',
      }),
    ),
    parallel: Type.Optional(
      Type.Integer({ minimum: 1, maximum: 16, default: 2, description: 'VMs at one time.' }),
    ),
    order: Type.Optional(
      OneOf(['smallest', 'largest', 'oldest'], 'By memory, or by age; `smallest` if absent.'),
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
});
export const CheckMigration = Exact({
  vm: VmToMove,
  options: MigrationOptions,
  qemuVersion: Type.String({ maxLength: 40 }),
  sentAt: Time,
});
export const MigrationCheck = Exact({
  problems: Type.Array(Problem),
  hasImage: Type.Boolean({ description: 'Else the source sends the base image first.' }),
});
const Ticket = Exact({ secret: Type.String({ maxLength: 200 }), expiresAt: Time });
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
  Exact({ name: Type.Literal('running'), epoch: Type.Integer(), complete: Type.Boolean() }),
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
export const MigrationResult = Exact({
  totalMs: Type.Number(),
  downtimeMs: Type.Optional(Type.Number()),
  qemuDowntimeMs: Type.Optional(Type.Number()),
  setupMs: Type.Number(),
  rounds: Type.Integer(),
  memoryBytes: Bytes,
  diskBytes: Bytes,
  zeroPages: Type.Integer(),
  dirtyBps: Bps,
  rateBps: Bps,
  throttlePercent: Type.Number(),
  pageRequests: Type.Integer(),
  finishedAs: OneOf(['precopy', 'postcopy']),
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
  createdAt: Time,
  finishedAt: Type.Optional(Time),
});
export const MigrationPage = Page(Migration);
export const MigrationPlan = Exact({
  problems: Type.Array(Problem),
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

// --- operations and events

export const Operation = Exact({
  id: Uuid,
  kind: Type.String(),
  subject: Exact({
    vmId: Type.Optional(Uuid),
    snapshotId: Type.Optional(Uuid),
    imageDigest: Type.Optional(Digest),
    migrationId: Type.Optional(Uuid),
    name: Type.Optional(Type.String()),
  }),
  state: OneOf(operationStates),
  progress: Type.Union([
    Exact({
      phase: Type.String(),
      done: Type.Number(),
      total: Type.Number(),
      unit: OneOf(['bytes', 'steps']),
    }),
    Type.Null(),
  ]),
  result: Type.Optional(Type.Record(Type.String(), Type.String())),
  error: Type.Optional(
    Exact({
      code: OneOf(errorCodes),
      message: Type.String(),
      details: Type.Record(Type.String(), Type.Unknown()),
    }),
  ),
  createdAt: Time,
  finishedAt: Type.Optional(Time),
});
export const OperationPage = Page(Operation);

export const Event = Exact({
  id: Type.Integer(),
  at: Time,
  kind: Type.String(),
  vmId: Type.Optional(Uuid),
  data: Type.Record(Type.String(), Type.Unknown()),
});

// --- credentials

export const Scope = OneOf(['admin', 'operate', 'read', 'device']);
export const CreateToken = Body(
  { name: 'reader', scopes: ['read'], expiresInS: 86_400 },
  {
    name: Type.String({ minLength: 1, maxLength: 100, pattern: '^[^\\u0000-\\u001f]*$' }),
    scopes: Type.Array(Scope, { minItems: 1, maxItems: 4, uniqueItems: true }),
    expiresInS: Type.Optional(Type.Integer({ minimum: 1, maximum: 10 * 366 * 24 * 3600 })),
    certificateFingerprint: Type.Optional(Fingerprint),
  },
);
export const Token = Exact({
  id: Uuid,
  name: Type.String(),
  kind: OneOf(['bearer', 'certificate']),
  scopes: Type.Array(Scope),
  createdAt: Time,
  expiresAt: Type.Optional(Time),
  revokedAt: Type.Optional(Time),
  lastUsedAt: Type.Optional(Time),
  certificateFingerprint: Type.Optional(Fingerprint),
});
export const TokenPage = Page(Token);
export const CreatedToken = Exact({
  token: Token,
  secret: Type.Optional(Type.String({ description: 'Shown this once. Absent for a certificate.' })),
});

// --- fleet

export const Peer = Exact({
  id: Uuid,
  name: Name,
  url: HttpsUrl,
  certificateFingerprint: Fingerprint,
  joinedAt: Time,
  lastSeenAt: Type.Optional(Time),
});
export const PeerList = Exact({ items: Type.Array(Peer, { maxItems: 10_000 }) });
export const CreateJoinToken = Exact({
  expiresInS: Type.Optional(Type.Integer({ minimum: 1, maximum: 30 * 24 * 3600, default: 3600 })),
});
export const JoinToken = Exact({ token: Type.String(), expiresAt: Time });
const Pem = Type.String({ maxLength: 20_000 });
export const JoinMember = Exact({
  token: Type.String({ maxLength: 200 }),
  id: Uuid,
  name: Name,
  url: HttpsUrl,
  csr: Pem,
});
export const JoinedMember = Exact({
  certificate: Pem,
  caCertificate: Pem,
  fleetId: Uuid,
  peers: Type.Array(Peer),
});

export const RenewCertificate = Exact({ csr: Pem });
export const RenewedCertificate = Exact({ certificate: Pem });

export type Schema<T extends TSchema> = Static<T>;
