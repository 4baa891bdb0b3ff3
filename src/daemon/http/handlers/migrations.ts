import type { Cloudlet } from '../../cloudlet.ts';
import type { Message } from '../../migrations/peer-side.ts';
import type { Handlers } from '../server.ts';

type Names =
  | 'migrateVm'
  | 'planMigration'
  | 'claimVm'
  | 'listMigrations'
  | 'getMigration'
  | 'limitMigration'
  | 'checkMigration'
  | 'prepareNetwork'
  | 'turnNetwork'
  | 'giveBackNetwork'
  | 'tellMigration'
  | 'listEscrows'
  | 'claimEscrow'
  | 'getEscrowOwner'
  | 'releaseEscrow';

export const migrationHandlers = ({ migrations, networks, vms, escrows }: Cloudlet): Handlers<Names> => ({
  migrateVm: ({ params, body }) => migrations.start(params.vm, body),
  planMigration: ({ params, body }) => migrations.plan(params.vm, body),
  claimVm: async ({ params, body, caller }) => {
    await migrations.claim(params.vm, body.reason, caller!);
    return vms.view(params.vm);
  },
  listMigrations: ({ query }) => migrations.list(query),
  getMigration: ({ params }) => migrations.get(params.migration),
  limitMigration: ({ params, body }) => migrations.setLimits(params.migration, body),
  checkMigration: ({ body }) => migrations.halves.check(body),
  prepareNetwork: ({ params, body, caller }) => networks.prepare(params.migration, body, caller!),
  turnNetwork: async ({ params, caller }) => {
    await networks.turn(params.migration, caller!);
    return undefined;
  },
  giveBackNetwork: async ({ params, caller }) => {
    await networks.giveBack(params.migration, caller!);
    return undefined;
  },
  tellMigration: ({ params, body, caller }) => {
    migrations.halves.tell(params.migration, body as Message, caller!);
    return undefined;
  },
  listEscrows: () => escrows.list(),
  claimEscrow: ({ params, body, caller }) => escrows.claim(params.migration, body, caller!),
  getEscrowOwner: ({ params, query, caller }) => escrows.owner(params.migration, query.gone, caller!),
  releaseEscrow: ({ params, caller }) => escrows.release(params.migration, caller!),
});
