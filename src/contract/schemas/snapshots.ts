/** Golden snapshots. */
import { Type } from 'typebox';
import { digestPattern } from '../../model/ids.ts';
import { Body, Bytes, Digest, Exact, Name, Page, Reference, Time, Uuid } from './basics.ts';
import { ImageIndex } from './images.ts';
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
export const PushSnapshot = Body(
  { to: 'south' },
  { to: Type.String({ minLength: 1, maxLength: 128, description: 'Id or name of the peer.' }) },
);
const record = {
  id: Uuid,
  name: Name,
  spec: VmSpec,
  createdAt: Time,
  memoryFileBytes: Bytes,
  diskFileBytes: Bytes,
  bootMs: Type.Number({ description: 'Power-on to a guest agent that answered, when it was made.' }),
  digest: Type.Optional(
    Type.String({
      pattern: digestPattern,
      description: 'Of its memory, the same at each cloudlet.',
    }),
  ),
};
/** What a cloudlet says of a snapshot that it sends to another one. */
export const SnapshotAnnouncement = Exact({
  snapshot: Exact({ ...record, digest: Digest }),
  disk: Exact({ bytes: Bytes, digest: Digest }),
});
export const Snapshot = Exact({ ...record, index: ImageIndex });
export const SnapshotPage = Page(Snapshot);
