/** Golden snapshots. */
import { Type } from 'typebox';
import { Body, Bytes, Exact, Name, Page, Reference, Time, Uuid } from './basics.ts';
import { Hardware, VmSpec } from './vms.ts';

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
