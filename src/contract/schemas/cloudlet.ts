/** The cloudlet itself. */
import { Type } from 'typebox';
import { BandwidthBps, Body, Bytes, Exact, Name, OneOf, Uuid } from './basics.ts';
import { MigrateVm } from './migrations.ts';

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

export const CloudletLimits = Exact({
  bandwidthBps: Type.Union([BandwidthBps, Type.Null()], {
    description:
      'The most that all migrations from here take together; null for no limit. VMs share it equally.',
  }),
});

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
  storages: Type.Array(Exact({ name: Name, kind: OneOf(['path', 'nfs', 'gluster']) }), {
    description: 'Where disks can be that other cloudlets have too.',
  }),
  limits: CloudletLimits,
  relay: Exact({
    memoryBytes: { ...Bytes, description: 'The most that it lends to the migrations of others.' },
    freeBytes: { ...Bytes, description: 'What it would take of them now.' },
    freeDiskBytes: { ...Bytes, description: 'What it would take of their disks now, on its own.' },
  }),
  draining: Type.Boolean({ description: 'Takes no VMs and gives its own away, until it is undrained.' }),
  vms: Exact({ total: Type.Integer(), running: Type.Integer() }),
});
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
    deadlineMs: Type.Optional(
      Type.Integer({
        minimum: 1000,
        maximum: 86_400_000,
        description:
          'The cloudlet is to be empty by then: order and engine are chosen for it, by way of relays where that is sooner. ' +
          'Refused beforehand if it cannot be, as far as earlier migrations tell.',
      }),
    ),
    order: Type.Optional(
      OneOf(['smallest', 'largest', 'oldest'], 'By memory, or by age; `smallest` if absent.'),
    ),
  },
);
