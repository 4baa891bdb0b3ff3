import { Type } from 'typebox';
import type { OperationName } from '../endpoints.ts';
import * as schema from '../schemas.ts';
import { object, page, type Route } from './route.ts';

const operation = object({ operation: schema.Uuid });

export const operationRoutes = {
  listOperations: {
    summary: 'Operations, oldest first',
    tag: 'operations',
    access: 'read',
    query: page,
    status: 200,
    reply: schema.OperationPage,
    errors: [],
  },
  getOperation: {
    summary: 'One operation; `waitMs` holds the answer back until it has ended or the time is over',
    tag: 'operations',
    access: 'read',
    params: operation,
    query: object({ waitMs: Type.Optional(Type.Integer({ minimum: 0, maximum: 60_000, default: 0 })) }),
    status: 200,
    reply: schema.Operation,
    errors: ['not_found'],
  },
  cancelOperation: {
    summary: 'Cancel an operation that runs; what it had made is undone',
    tag: 'operations',
    access: 'operate',
    params: operation,
    status: 202,
    reply: schema.Operation,
    errors: ['not_found', 'wrong_state'],
  },
  streamEvents: {
    summary: 'Server-sent events. `Last-Event-ID` or `after` resumes; `gap` says that older ones are gone',
    tag: 'operations',
    access: 'read',
    query: object({ after: Type.Optional(Type.Integer({ minimum: 0 })) }),
    status: 200,
    replyType: 'text/event-stream',
    errors: ['too_many'],
  },
} as const satisfies Partial<Record<OperationName, Route>>;
