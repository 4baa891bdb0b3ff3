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
  | 'tellMigration';

export const migrationHandlers = ({ migrations, networks, vms }: Cloudlet): Handlers<Names> => ({
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
});
