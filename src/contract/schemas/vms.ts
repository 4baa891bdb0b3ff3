/** Virtual machines, and what their guests say. */
import { Type } from 'typebox';
import { vmActions, vmStates } from '../../model/states.ts';
import { GiB, MiB } from '../../model/units.ts';
import { Body, Digest, Exact, Mac, Name, OneOf, Page, PlainText, Reference, Time, Uuid } from './basics.ts';
import { Attachment, Continuity } from './networks.ts';

const CpuCount = Type.Integer({ minimum: 1, maximum: 64 });
const MemoryBytes = Type.Integer({ minimum: 64 * MiB, maximum: 1024 * GiB, multipleOf: MiB });
const DiskBytes = Type.Integer({ minimum: MiB, maximum: 16384 * GiB, multipleOf: 512 });
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
  disk: Exact({ image: Digest, sizeBytes: DiskBytes, storage: Type.Optional(Name) }),
  nets: Type.Array(Exact({ network: Type.String(), mac: Mac })),
  seed: Exact({
    hostname: Name,
    sshKeys: Type.Array(Type.String()),
    addresses: Type.Array(Address),
    waiting: Type.Optional(Type.Array(Mac)),
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

/** For whom a VM runs. */
export const Tenant = {
  ...Name,
  description:
    'a-z, 0-9 and hyphens, at most 63 characters: for whom it runs. VMs of one tenant send what they have in common once ' +
    '(engine `relayed`).',
};

export const CreateVm = Body(
  { name: 'web', image: 'tiny', instanceType: 'tiny' },
  {
    name: Name,
    image: Type.Optional(Reference),
    snapshot: Type.Optional(Reference),
    instanceType: Type.Optional(Name),
    hardware: Type.Optional(Hardware),
    storage: Type.Optional({
      ...Name,
      description:
        'A storage of the cloudlet, for a disk that other cloudlets open too; its own disk if absent.',
    }),
    seed: Type.Optional(Seed),
    start: Type.Optional(Type.Boolean({ default: true })),
    continuity: Type.Optional(Continuity),
    tenant: Type.Optional(Tenant),
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
/** It stands still because its disk fails, and goes on by itself when that is mended. */
const Stalled = Exact({ at: Time, reason: Type.String() });
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
  stalled: Type.Optional(Stalled),
  epoch: Type.Optional(Type.Integer({ description: 'Rises with each change of owner.' })),
  attachment: Type.Optional(Attachment),
  continuity: Type.Optional(Continuity),
  tenant: Type.Optional(Tenant),
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
