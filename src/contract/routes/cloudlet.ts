import { Type } from 'typebox';
import type { OperationName } from '../endpoints.ts';
import * as schema from '../schemas.ts';
import type { Route } from './route.ts';

export const cloudletRoutes = {
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
    errors: ['not_found', 'too_many', 'busy', 'migration_refused'],
  },
  limitCloudlet: {
    summary: 'Limit what all migrations from this cloudlet take together, from now on',
    tag: 'cloudlet',
    access: 'operate',
    body: schema.CloudletLimits,
    status: 200,
    reply: schema.CloudletLimits,
    errors: [],
  },
  getRelay: {
    summary: 'The memory that this cloudlet lends to the migrations of others, and to which',
    tag: 'cloudlet',
    access: 'read',
    status: 200,
    reply: schema.Relay,
    errors: [],
  },
  lendMemory: {
    summary: 'Lend memory to the migrations of others, as far as it is free when it is needed',
    tag: 'cloudlet',
    access: 'operate',
    body: schema.LendMemory,
    status: 200,
    reply: schema.Relay,
    errors: [],
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
} as const satisfies Partial<Record<OperationName, Route>>;
