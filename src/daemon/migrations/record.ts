/** What is kept of a migration at each of its two ends: all that a daemon needs to go on with it, and its history. */
import type { Static } from 'typebox';
import type { Migration } from '../../contract/schemas.ts';
import type { DestinationState } from '../../migration/destination-machine.ts';
import type { Ending } from '../../migration/protocol.ts';
import type { SourceState } from '../../migration/source-machine.ts';
import type { Uuid } from '../../model/ids.ts';
import type {
  MigrationOptions,
  MigrationProgress,
  MigrationResult,
  VmToMove,
} from '../../model/migration.ts';

interface Common {
  id: Uuid;
  vm: VmToMove;
  options: MigrationOptions;
  /** The cloudlet at the other end. */
  peer: { id: Uuid; name: string };
  createdAt: string;
  /** At rest for good: it is history. */
  finishedAt?: string;
  progress?: MigrationProgress;
  result?: MigrationResult;
  /** The base image that was sent before. */
  imageBytes?: number;
  /** The last word to the operator: what does not go on by itself, and what to do about it. */
  attention?: string;
}
export type SourceRecord = Common & { role: 'source'; state: SourceState };
export type DestinationRecord = Common & { role: 'destination'; state: DestinationState };
export type MigrationRecord = SourceRecord | DestinationRecord;

/** Why it did not move the VM, if it did not. */
export function endingOf(record: MigrationRecord): Ending | undefined {
  if (record.role === 'source') return 'ending' in record.state ? record.state.ending : undefined;
  return 'reason' in record.state ? { code: 'rejected', message: record.state.reason } : undefined;
}

export function viewOf(record: MigrationRecord): Static<typeof Migration> {
  const { id, role, vm, peer, options, state, progress, result, attention, createdAt, finishedAt } = record;
  const failure = endingOf(record);
  return {
    id,
    role,
    vm: { id: vm.id, name: vm.name },
    peer,
    options,
    state: state.name,
    over: finishedAt !== undefined,
    ...(progress ? { progress } : {}),
    ...(result ? { result } : {}),
    ...(failure ? { failure } : {}),
    ...(attention === undefined ? {} : { attention }),
    createdAt,
    ...(finishedAt ? { finishedAt } : {}),
  };
}
