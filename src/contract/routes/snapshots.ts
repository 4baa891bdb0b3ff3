import type { OperationName } from '../endpoints.ts';
import * as schema from '../schemas.ts';
import { object, page, type Route } from './route.ts';

const snapshot = object({ snapshot: schema.Reference });

export const snapshotRoutes = {
  listSnapshots: {
    summary: 'Golden snapshots, oldest first',
    tag: 'snapshots',
    access: 'read',
    query: page,
    status: 200,
    reply: schema.SnapshotPage,
    errors: [],
  },
  createSnapshot: {
    summary: 'Boot an image once and keep its RAM and disk, so that VMs start from there without booting',
    tag: 'snapshots',
    access: 'operate',
    body: schema.CreateSnapshot,
    status: 202,
    reply: schema.Operation,
    errors: ['not_found', 'name_taken', 'unsupported', 'insufficient_space', 'too_many'],
  },
  pushSnapshot: {
    summary:
      'Copy a golden snapshot to a peer, its image first if need be; what it has of a VM then need not travel',
    tag: 'snapshots',
    access: 'operate',
    params: snapshot,
    body: schema.PushSnapshot,
    status: 202,
    reply: schema.Operation,
    errors: ['not_found', 'too_many'],
  },
  getSnapshot: {
    summary: 'One golden snapshot, by id or name',
    tag: 'snapshots',
    access: 'read',
    params: snapshot,
    status: 200,
    reply: schema.Snapshot,
    errors: ['not_found'],
  },
  deleteSnapshot: {
    summary: 'Remove a golden snapshot; VMs that came from it stay',
    tag: 'snapshots',
    access: 'operate',
    params: snapshot,
    status: 204,
    errors: ['not_found', 'in_use'],
  },
} as const satisfies Partial<Record<OperationName, Route>>;
