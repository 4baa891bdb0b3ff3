/** `viper neighbours`, `viper decisions`, `viper groups` and `viper vm placement`: where VMs should be, and why. */
import type { Command } from 'commander';
import type { Decision } from '../../sdk/client.ts';
import { formatAge, formatBitRate, formatDuration, formatTime, type Output } from '../output.ts';
import { addCommand, withSession } from '../session.ts';
import { formatRtt } from './device.ts';
import { listAll } from './lists.ts';

export function addFollowCommands(program: Command): void {
  addCommand(program, 'neighbours', 'RTT and bandwidth to the other cloudlets', 'viper neighbours').action(
    withSession(async ({ viper, output, signal }) => {
      const list = await viper.listNeighbours({ signal });
      const rows = list.items.map((each) => [
        each.name,
        each.standing,
        formatRtt(each.rttMs),
        formatRtt(each.jitterMs),
        `${Math.round(each.lossRatio * 100)}%`,
        each.bandwidthBps === undefined ? '-' : formatBitRate(each.bandwidthBps),
        each.lans.join(',') || '-',
        each.answeredAt ? `${formatAge(each.answeredAt)} ago` : 'never',
      ]);
      const headers = ['NAME', 'STANDING', 'RTT', 'JITTER', 'LOSS', 'BANDWIDTH', 'LANS', 'MEASURED'];
      output.show(list, () => output.table(headers, rows, 'There are no other cloudlets.'));
    }),
  );

  addCommand(
    program,
    'decisions [decision]',
    'what was decided about VMs of this cloudlet; one with all that it was made from',
    'viper decisions',
  ).action(
    withSession(async (session, id: string | undefined) => {
      const { viper, output, signal } = session;
      if (id !== undefined) {
        const decision = await viper.getDecision({ params: { decision: id }, signal });
        return output.show(decision, () => showDecision(output, decision));
      }
      await listAll(
        session,
        viper.listDecisions,
        ['WHEN', 'VM', 'TRIGGER', 'OUTCOME', 'TARGET', 'RESULT', 'ID'],
        (each) => [
          `${formatAge(each.at)} ago`,
          each.vm.name,
          each.trigger.kind,
          each.outcome,
          each.target?.name ?? '-',
          resultOf(each),
          each.id,
        ],
        'Nothing was decided yet.',
      );
    }),
  );

  addCommand(
    program,
    'groups [group]',
    'VPN groups of cloudlets in walking distance; of one, the WireGuard configuration of this cloudlet',
    'viper groups vpn1 > /etc/wireguard/vpr-vpn1.conf',
  ).action(
    withSession(async ({ viper, output, signal }, group: string | undefined) => {
      if (group !== undefined) {
        return output.line((await viper.getGroupConfig({ params: { group }, signal })).trimEnd());
      }
      const list = await viper.listGroups({ signal });
      const rows = list.items.map(({ name, members }) => [name, members.map((each) => each.name).join(' ')]);
      output.show(list, () =>
        output.table(
          ['NAME', 'MEMBERS'],
          rows,
          'No cloudlet says where it stands (follow.site in config.json).',
        ),
      );
    }),
  );
}

export function addPlacementCommand(vm: Command): void {
  addCommand(
    vm,
    'placement <vm>',
    'where the VM should be now and why, without moving it',
    'viper vm placement web',
  ).action(
    withSession(async ({ viper, output, signal }, name: string) => {
      const decision = await viper.getPlacement({ params: { vm: name }, signal });
      output.show(decision, () => showDecision(output, decision));
    }),
  );
}

function showDecision(output: Output, decision: Decision): void {
  const { vm, device, here, outcome, target, reasons, trigger } = decision;
  output.facts([
    ['VM', vm.name],
    ['Device', device?.name],
    ['Here', `${here.name}, ${formatRtt(here.deviceRttMs)} from the device`],
    ['Decided', `${formatTime(decision.at)} UTC, in ${formatDuration(decision.tookMs)}, by ${trigger.kind}`],
    ['Outcome', target ? `${outcome}: ${target.name}` : outcome],
    ['Result', decision.acted ? resultOf(decision) : undefined],
  ]);
  for (const reason of reasons) output.line(`  ${reason}`);
  const rows = decision.candidates.map(({ name, deviceRttMs, neighbourRttMs, forecast, verdict, why }) => [
    name,
    formatRtt(deviceRttMs),
    formatRtt(neighbourRttMs),
    forecast ? formatDuration(forecast.totalMs) : '-',
    forecast ? formatDuration(forecast.downtimeMs) : '-',
    verdict,
    why,
  ]);
  if (rows.length > 0)
    output.table(['CLOUDLET', 'DEVICE', 'HERE', 'TIME', 'DOWNTIME', 'VERDICT', 'WHY'], rows, '');
}

function resultOf({ acted, result }: Decision): string {
  if (!acted) return '-';
  if (!result) return 'on its way';
  const { moved, totalMs, message } = result;
  if (!moved) return message;
  return totalMs === undefined ? 'moved' : `moved in ${formatDuration(totalMs)}`;
}
