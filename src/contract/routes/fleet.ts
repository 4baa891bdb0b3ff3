import type { OperationName } from '../endpoints.ts';
import * as schema from '../schemas.ts';
import { object, type Route } from './route.ts';

export const fleetRoutes = {
  listPeers: {
    summary: 'The other cloudlets of the fleet',
    tag: 'fleet',
    access: 'read-or-peer',
    status: 200,
    reply: schema.PeerList,
    errors: [],
  },
  announcePeer: {
    summary: 'A cloudlet tells of itself',
    tag: 'fleet',
    access: 'peer',
    body: schema.Peer,
    status: 204,
    errors: [],
  },
  removePeer: {
    summary: 'Put a cloudlet out of the fleet: everywhere if the founder is told, else as this one sees it',
    tag: 'fleet',
    access: 'admin',
    params: object({ peer: schema.Uuid }),
    status: 204,
    errors: ['not_found'],
  },
  createJoinToken: {
    summary:
      'A single-use token with which another cloudlet joins; it carries the fingerprint of the fleet CA',
    tag: 'fleet',
    access: 'admin',
    body: schema.CreateJoinToken,
    status: 201,
    reply: schema.JoinToken,
    errors: ['unsupported'],
  },
  renewCertificate: {
    summary: 'A new certificate for the cloudlet that asks, before its present one ends',
    tag: 'fleet',
    access: 'peer',
    body: schema.RenewCertificate,
    status: 201,
    reply: schema.RenewedCertificate,
    errors: ['not_found', 'unsupported'],
  },
  announceRemoval: {
    summary: 'The founder of the fleet has put a cloudlet out of it',
    tag: 'fleet',
    access: 'peer',
    params: object({ peer: schema.Uuid }),
    status: 204,
    errors: [],
  },
  joinMember: {
    summary: 'Join the fleet with a join token: a certificate for the key in the request',
    tag: 'fleet',
    access: 'open',
    body: schema.JoinMember,
    status: 201,
    reply: schema.JoinedMember,
    errors: ['name_taken', 'unsupported'],
  },
} as const satisfies Partial<Record<OperationName, Route>>;
