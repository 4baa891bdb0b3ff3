/** What one endpoint takes, answers and refuses, and the parts that several endpoints share. */
import { type TSchema, Type } from 'typebox';
import type { ErrorCode } from '../../model/errors.ts';
import * as schema from '../schemas.ts';

/** `open`: no credential; `any`: any good one; else the scope that is wanted (`peer`: a cloudlet of the fleet; `device`: a device). */
export type Access = 'open' | 'any' | 'read' | 'operate' | 'admin' | 'peer' | 'read-or-peer' | 'device';

export interface Route {
  summary: string;
  tag:
    | 'cloudlet'
    | 'images'
    | 'snapshots'
    | 'vms'
    | 'migrations'
    | 'following'
    | 'operations'
    | 'tokens'
    | 'fleet';
  access: Access;
  params?: TSchema;
  query?: TSchema;
  /** A JSON body; `binaryBody` instead for raw bytes. */
  body?: TSchema;
  binaryBody?: true;
  status: 101 | 200 | 201 | 202 | 204;
  /** The JSON that answers; `replyType` names another content type. */
  reply?: TSchema;
  replyType?: 'text/plain' | 'text/event-stream';
  /** Beside those that every route can give: invalid_request, unauthenticated, forbidden, internal. */
  errors: readonly ErrorCode[];
}

export const object = <T extends Record<string, TSchema>>(properties: T) =>
  Type.Object(properties, { additionalProperties: false });
export const vm = object({ vm: schema.Reference });
export const page = object(schema.PageQuery);

/** Errors of every operation that works on one VM. */
export const onVm = ['not_found', 'wrong_state', 'busy', 'too_many'] as const;
