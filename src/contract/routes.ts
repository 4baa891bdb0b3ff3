/**
 * The contract: what goes into and comes out of every endpoint, who may call it and how it can be refused.
 * The daemon registers its handlers against this table and nothing else answers; the OpenAPI document and the
 * types of the SDK are made from it.
 */
import { type Static, type TSchema, Type } from 'typebox';
import type { ErrorCode } from '../model/errors.ts';
import { endpoints, type OperationName } from './endpoints.ts';
import * as schema from './schemas.ts';

/** `open`: no credential; `any`: any good one; else the scope that is wanted (`peer`: a cloudlet of the fleet). */
export type Access = 'open' | 'any' | 'read' | 'operate' | 'admin' | 'peer' | 'read-or-peer';

export interface Route {
  summary: string;
  tag: 'cloudlet' | 'images' | 'snapshots' | 'vms' | 'migrations' | 'operations' | 'tokens' | 'fleet';
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

const object = <T extends Record<string, TSchema>>(properties: T) =>
  Type.Object(properties, { additionalProperties: false });
const vm = object({ vm: schema.Reference });
const image = object({ image: schema.Reference });
const snapshot = object({ snapshot: schema.Reference });
const operation = object({ operation: schema.Uuid });
const migration = object({ migration: schema.Uuid });
const page = object(schema.PageQuery);

/** Errors of every operation that works on one VM. */
const onVm = ['not_found', 'wrong_state', 'busy', 'too_many'] as const;

export const routes = {
  getHealth: {
    summary: 'Is the daemon alive',
    tag: 'cloudlet',
    access: 'open',
    status: 200,
    reply: schema.Health,
    errors: [],
  },
  getMetrics: {
    summary: 'Prometheus metrics',
    tag: 'cloudlet',
    access: 'read',
    status: 200,
    replyType: 'text/plain',
    errors: [],
  },
  getOpenApi: {
    summary: 'This document',
    tag: 'cloudlet',
    access: 'open',
    status: 200,
    reply: Type.Unknown(),
    errors: [],
  },
  getWhoami: {
    summary: 'Who the credential belongs to and what it may do',
    tag: 'cloudlet',
    access: 'any',
    status: 200,
    reply: schema.Whoami,
    errors: [],
  },
  getCloudlet: {
    summary: 'The cloudlet: identity, QEMU, capacity, networks',
    tag: 'cloudlet',
    access: 'read-or-peer',
    status: 200,
    reply: schema.Cloudlet,
    errors: [],
  },
  drainCloudlet: {
    summary:
      'Move every running VM to peers that have room, and take no new ones until the cloudlet is undrained. ' +
      'Cancelling the operation stops the migrations that run',
    tag: 'cloudlet',
    access: 'operate',
    body: schema.Drain,
    status: 202,
    reply: schema.Operation,
    errors: ['not_found', 'too_many', 'busy'],
  },
  undrainCloudlet: {
    summary: 'Take VMs again',
    tag: 'cloudlet',
    access: 'operate',
    status: 204,
    errors: [],
  },
  listInstanceTypes: {
    summary: 'The instance types that a VM can be created with',
    tag: 'cloudlet',
    access: 'read',
    status: 200,
    reply: schema.InstanceTypeList,
    errors: [],
  },

  listImages: {
    summary: 'Images, oldest first',
    tag: 'images',
    access: 'read',
    query: page,
    status: 200,
    reply: schema.ImagePage,
    errors: [],
  },
  importImage: {
    summary:
      'Import a disk image: the body is the file itself, qcow2 or raw. The same bytes give the same image',
    tag: 'images',
    access: 'operate',
    query: schema.ImportQuery,
    binaryBody: true,
    status: 201,
    reply: schema.Image,
    errors: [
      'image_corrupt',
      'digest_mismatch',
      'insufficient_space',
      'name_taken',
      'unsupported_media_type',
      'too_many',
    ],
  },
  getImage: {
    summary: 'One image, by digest or alias',
    tag: 'images',
    access: 'read',
    params: image,
    status: 200,
    reply: schema.Image,
    errors: ['not_found'],
  },
  deleteImage: {
    summary: 'Remove an image that no VM and no snapshot uses',
    tag: 'images',
    access: 'operate',
    params: image,
    status: 204,
    errors: ['not_found', 'in_use'],
  },
  addImageAlias: {
    summary: 'Give an image a name; an alias of another image moves over',
    tag: 'images',
    access: 'operate',
    params: object({ image: schema.Reference, alias: schema.Name }),
    status: 200,
    reply: schema.Image,
    errors: ['not_found'],
  },
  removeImageAlias: {
    summary: 'Take a name from an image',
    tag: 'images',
    access: 'operate',
    params: object({ image: schema.Reference, alias: schema.Name }),
    status: 204,
    errors: ['not_found'],
  },

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

  listVms: {
    summary: 'VMs, oldest first',
    tag: 'vms',
    access: 'read',
    query: page,
    status: 200,
    reply: schema.VmPage,
    errors: [],
  },
  createVm: {
    summary: 'Create a VM from an image or a golden snapshot, and start it',
    tag: 'vms',
    access: 'operate',
    body: schema.CreateVm,
    status: 202,
    reply: schema.Operation,
    errors: [
      'not_found',
      'name_taken',
      'unsupported',
      'insufficient_space',
      'insufficient_memory',
      'too_many',
    ],
  },
  getVm: {
    summary: 'One VM, by id or name',
    tag: 'vms',
    access: 'read',
    params: vm,
    status: 200,
    reply: schema.Vm,
    errors: ['not_found'],
  },
  deleteVm: {
    summary: 'Delete a VM and its disk; one that runs only with `force`',
    tag: 'vms',
    access: 'operate',
    params: vm,
    query: object({ force: Type.Optional(Type.Boolean({ default: false })) }),
    status: 202,
    reply: schema.Operation,
    errors: onVm,
  },
  startVm: {
    summary: 'Start a VM',
    tag: 'vms',
    access: 'operate',
    params: vm,
    status: 202,
    reply: schema.Operation,
    errors: [...onVm, 'unsupported', 'insufficient_memory'],
  },
  stopVm: {
    summary: 'Stop a VM: through the guest agent or ACPI, and by force after the grace time',
    tag: 'vms',
    access: 'operate',
    params: vm,
    body: schema.StopVm,
    status: 202,
    reply: schema.Operation,
    errors: onVm,
  },
  pauseVm: {
    summary: 'Stop the vCPUs; memory stays',
    tag: 'vms',
    access: 'operate',
    params: vm,
    status: 202,
    reply: schema.Operation,
    errors: onVm,
  },
  resumeVm: {
    summary: 'Let the vCPUs of a paused VM go on',
    tag: 'vms',
    access: 'operate',
    params: vm,
    status: 202,
    reply: schema.Operation,
    errors: onVm,
  },
  cloneVm: {
    summary:
      'Clone a VM: a stopped one by its disk, a running one with its RAM, so that the clone goes on from there',
    tag: 'vms',
    access: 'operate',
    params: vm,
    body: schema.CloneVm,
    status: 202,
    reply: schema.Operation,
    errors: [...onVm, 'name_taken', 'agent_unavailable', 'insufficient_space', 'insufficient_memory'],
  },
  migrateVm: {
    summary: 'Move a VM to another cloudlet of the fleet while it runs',
    tag: 'migrations',
    access: 'operate',
    params: vm,
    body: schema.MigrateVm,
    status: 202,
    reply: schema.Operation,
    errors: [...onVm, 'migration_refused', 'peer_unreachable', 'peer_untrusted'],
  },
  planMigration: {
    summary: 'Would it fit, and what would it cost: the checks and the forecast of a migration, without it',
    tag: 'migrations',
    access: 'read',
    params: vm,
    body: schema.MigrateVm,
    status: 200,
    reply: schema.MigrationPlan,
    errors: ['not_found', 'wrong_state', 'peer_unreachable', 'peer_untrusted'],
  },
  claimVm: {
    summary:
      'Say as an operator that this cloudlet owns a VM whose migration hangs because the other cloudlet is gone. ' +
      'Only when it is sure that the other side will not run it',
    tag: 'migrations',
    access: 'admin',
    params: vm,
    body: schema.ClaimVm,
    status: 200,
    reply: schema.Vm,
    errors: ['not_found', 'wrong_state'],
  },
  getGuest: {
    summary: 'What the guest agent says of the guest',
    tag: 'vms',
    access: 'read',
    params: vm,
    status: 200,
    reply: schema.Guest,
    errors: ['not_found', 'wrong_state', 'agent_unavailable'],
  },
  execInGuest: {
    summary: 'Run a program in the guest and wait for its end',
    tag: 'vms',
    access: 'operate',
    params: vm,
    body: schema.Exec,
    status: 200,
    reply: schema.ExecReply,
    errors: ['not_found', 'wrong_state', 'agent_unavailable', 'timeout'],
  },
  getConsoleLog: {
    summary: 'The last bytes that the serial console wrote',
    tag: 'vms',
    access: 'read',
    params: vm,
    query: object({
      tailBytes: Type.Optional(Type.Integer({ minimum: 1, maximum: 1024 * 1024, default: 65536 })),
    }),
    status: 200,
    replyType: 'text/plain',
    errors: ['not_found'],
  },
  attachConsole: {
    summary:
      'The live serial console as a WebSocket of binary messages. Browsers, which cannot set headers, offer the ' +
      'subprotocols viper.console and bearer.TOKEN',
    tag: 'vms',
    access: 'operate',
    params: vm,
    status: 101,
    errors: ['not_found', 'wrong_state', 'too_many'],
  },

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

  listMigrations: {
    summary: 'Migrations from and to this cloudlet, oldest first',
    tag: 'migrations',
    access: 'read',
    query: page,
    status: 200,
    reply: schema.MigrationPage,
    errors: [],
  },
  getMigration: {
    summary: 'One migration: state, progress, result',
    tag: 'migrations',
    access: 'read',
    params: migration,
    status: 200,
    reply: schema.Migration,
    errors: ['not_found'],
  },
  limitMigration: {
    summary: 'Change the limits of a migration while it runs',
    tag: 'migrations',
    access: 'operate',
    params: migration,
    body: schema.Limits,
    status: 200,
    reply: schema.Migration,
    errors: ['not_found', 'wrong_state'],
  },
  checkMigration: {
    summary: 'Asked by the source: would this cloudlet take the VM',
    tag: 'migrations',
    access: 'peer',
    params: migration,
    body: schema.CheckMigration,
    status: 200,
    reply: schema.MigrationCheck,
    errors: [],
  },
  tellMigration: {
    summary: 'A message of the other cloudlet of a migration',
    tag: 'migrations',
    access: 'peer',
    params: migration,
    body: schema.MigrationMessage,
    status: 204,
    errors: [],
  },

  listTokens: {
    summary: 'Credentials, oldest first; never their secrets',
    tag: 'tokens',
    access: 'admin',
    query: page,
    status: 200,
    reply: schema.TokenPage,
    errors: [],
  },
  createToken: {
    summary: 'Make a bearer token, or register a client certificate by its fingerprint',
    tag: 'tokens',
    access: 'admin',
    body: schema.CreateToken,
    status: 201,
    reply: schema.CreatedToken,
    errors: ['name_taken'],
  },
  revokeToken: {
    summary: 'Revoke a credential at once',
    tag: 'tokens',
    access: 'admin',
    params: object({ token: schema.Uuid }),
    status: 204,
    errors: ['not_found', 'in_use'],
  },

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
    summary: 'Put a cloudlet out of the fleet, as this one sees it',
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
  joinMember: {
    summary: 'Join the fleet with a join token: a certificate for the key in the request',
    tag: 'fleet',
    access: 'open',
    body: schema.JoinMember,
    status: 201,
    reply: schema.JoinedMember,
    errors: ['name_taken', 'unsupported'],
  },
} as const satisfies Record<OperationName, Route>;

export type Routes = typeof routes;

type Part<R, K extends string> = R extends { [P in K]: infer S extends TSchema } ? Static<S> : undefined;
/** The parts of a request that an operation takes, for handlers and the SDK. */
export interface RouteInput<K extends OperationName> {
  params: Part<Routes[K], 'params'>;
  query: Part<Routes[K], 'query'>;
  body: Part<Routes[K], 'body'>;
}
export type RouteReply<K extends OperationName> = Routes[K] extends { reply: infer S extends TSchema }
  ? Static<S>
  : Routes[K] extends { replyType: 'text/plain' }
    ? string
    : undefined;

export { endpoints, type OperationName };
