/** Long work and what happened, as plain data: an operation is journalled when it starts and when it ends. */
import type { ErrorCode, ErrorDetails } from './errors.ts';
import type { ImageDigest, Uuid } from './ids.ts';
import type { OperationState } from './states.ts';

export const operationKinds = [
  'vm.create',
  'vm.start',
  'vm.stop',
  'vm.pause',
  'vm.resume',
  'vm.clone',
  'vm.delete',
  'vm.migrate',
  'vm.claim',
  'cloudlet.drain',
  'snapshot.create',
  'snapshot.push',
] as const;
export type OperationKind = (typeof operationKinds)[number];

/** What an operation works on; `name` is the name of what it makes, as long as that has no id yet. */
export interface OperationSubject {
  vmId?: Uuid;
  imageDigest?: ImageDigest;
  snapshotId?: Uuid;
  name?: string;
  migrationId?: Uuid;
}

/** How far the present phase has come. Within one phase `done` never falls. */
export interface Progress {
  phase: string;
  done: number;
  total: number;
  unit: 'bytes' | 'steps';
}

export interface Operation {
  id: Uuid;
  kind: OperationKind;
  subject: OperationSubject;
  state: OperationState;
  progress: Progress | null;
  result?: Record<string, string>;
  error?: { code: ErrorCode; message: string; details: ErrorDetails };
  createdAt: string;
  finishedAt?: string;
}

/** Something that happened on this cloudlet. Ids rise, with holes, and are never used twice. */
export interface EventRecord {
  id: number;
  at: string;
  kind: string;
  vmId?: Uuid;
  data: Record<string, unknown>;
}
