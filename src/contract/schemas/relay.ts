/** Memory and disk space that a cloudlet lends to the migrations of others. */
import { Type } from 'typebox';
import { Body, Bytes, Exact, OneOf, Uuid } from './basics.ts';

export const LendMemory = Body(
  { memoryBytes: 4 * 2 ** 30 },
  {
    memoryBytes: { ...Bytes, description: 'The most that is lent; 0: nothing.' },
    diskBytes: Type.Optional({
      ...Bytes,
      description: 'The most that is lent of the disk, for disks that are not shared; nothing if absent.',
    }),
  },
);
export const Relay = Exact({
  memoryBytes: { ...Bytes, description: 'The most that is lent; 0: nothing.' },
  usedBytes: Bytes,
  freeBytes: {
    ...Bytes,
    description:
      'What it would take now: of what it lends, and of what its host has left. Nothing is reserved.',
  },
  disk: Exact({
    lentBytes: { ...Bytes, description: 'The most that is lent of the disk; 0: nothing.' },
    usedBytes: Bytes,
    freeBytes: { ...Bytes, description: 'What it would take now. Nothing is reserved.' },
  }),
  migrations: Type.Array(
    Exact({
      holds: OneOf(['memory', 'disk'], 'What it holds of the VM, and in what.'),
      migrationId: Uuid,
      cloudlet: Type.String({ description: 'The source, from which it has the memory.' }),
      slabs: Type.Integer({ minimum: 0 }),
      bytes: Bytes,
    }),
  ),
});
