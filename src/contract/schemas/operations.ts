/** Long work, and what happens. */
import { Type } from 'typebox';
import { errorCodes } from '../../model/errors.ts';
import { operationStates } from '../../model/states.ts';
import { Digest, Exact, OneOf, Page, Time, Uuid } from './basics.ts';

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
