/** `viper escrow`: VMs of other cloudlets that this one may go on with. */
import type { Command } from 'commander';
import { formatBytes } from '../../model/units.ts';
import { formatAge } from '../output.ts';
import { addCommand, addGroup, withSession } from '../session.ts';

export function addEscrowCommands(program: Command): void {
  const escrow = addGroup(program, 'escrow', 'VMs that this cloudlet is the custodian of');

  addCommand(
    escrow,
    'list',
    'VMs that can go on here if their destination is lost before they are whole: viper vm claim --from MIGRATION',
    'viper escrow list',
  ).action(
    withSession(async ({ viper, output, signal }) => {
      const list = await viper.listEscrows({ signal });
      const rows = list.items.map((each) => [
        each.vm.name,
        each.from.name,
        each.state,
        formatBytes(each.memoryBytes),
        formatAge(each.createdAt),
        each.migrationId,
      ]);
      const headers = ['VM', 'RUNS AT', 'STATE', 'MEMORY', 'AGE', 'MIGRATION'];
      output.show(list, () => output.table(headers, rows, 'This cloudlet is the custodian of no VM.'));
    }),
  );
}
