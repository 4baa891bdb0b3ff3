import type { OperationName } from '../endpoints.ts';
import * as schema from '../schemas.ts';
import { object, onVm, page, type Route, vm } from './route.ts';

const migration = object({ migration: schema.Uuid });

export const migrationRoutes = {
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
  prepareNetwork: {
    summary:
      'Asked by the source: reserve an address for a VM that will come, and make this end of its tunnel',
    tag: 'migrations',
    access: 'peer',
    params: migration,
    body: schema.PrepareNetwork,
    status: 200,
    reply: schema.PreparedNetwork,
    errors: ['unsupported', 'no_free_address'],
  },
  turnNetwork: {
    summary: 'Told by the source: the VM stands still, and frames for it wait at the destination from now on',
    tag: 'migrations',
    access: 'peer',
    params: migration,
    status: 204,
    errors: [],
  },
  giveBackNetwork: {
    summary: 'Asked by the source: the VM does not come, or is there no longer',
    tag: 'migrations',
    access: 'peer',
    params: migration,
    status: 204,
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
} as const satisfies Partial<Record<OperationName, Route>>;
