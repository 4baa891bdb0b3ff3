/** `viper vm …`: the life of a VM. What reaches into a running one is in vm-guest.ts and vm-console.ts. */
import type { Command } from 'commander';
import { formatBytes } from '../../model/units.ts';
import type { Operation, Vm } from '../../sdk/client.ts';
import { formatAge, formatTime, paintState, shortDigest } from '../output.ts';
import { addLongWorkOptions, finish, type LongWorkOptions } from '../progress.ts';
import { addCommand, addGroup, type Session, withSession } from '../session.ts';
import { parseDuration } from '../values.ts';
import { addPlacementCommand } from './follow.ts';
import { listAll } from './lists.ts';
import { addVmConsoleCommands } from './vm-console.ts';
import { addVmCreateCommand } from './vm-create.ts';
import { addVmGuestCommands } from './vm-guest.ts';
import { addVmMigrateCommands } from './vm-migrate.ts';

export function addVmCommands(program: Command): void {
  const vm = addGroup(program, 'vm', 'virtual machines');
  addVmCreateCommand(vm);

  addCommand(vm, 'list', 'all VMs, oldest first', 'viper vm list').action(
    withSession((session) =>
      listAll(
        session,
        session.viper.listVms,
        ['NAME', 'STATE', 'CPUS', 'MEMORY', 'IMAGE', 'AGE', 'ID'],
        (each) => [
          each.name,
          paintState(each.state),
          String(each.cpus),
          formatBytes(each.memoryBytes),
          shortDigest(each.image),
          formatAge(each.createdAt),
          each.id,
        ],
        'There are no VMs. Make one: viper vm create NAME --image IMAGE',
      ),
    ),
  );

  addCommand(vm, 'show <vm>', 'one VM, by name or id', 'viper vm show web').action(
    withSession(async ({ viper, output, signal }, name: string) => {
      const found = await viper.getVm({ params: { vm: name }, signal });
      output.show(found, () => output.facts(factsOf(found)));
    }),
  );

  addStateCommands(vm);
  addPlacementCommand(vm);

  addLongWorkOptions(
    addCommand(
      vm,
      'clone <vm> <name>',
      'clone a VM; a running one with its RAM, so that the clone goes on from there',
      'viper vm clone web web-2',
    ),
  )
    .option('--keep-identity', 'keep MACs, host name and machine id')
    .action(
      withSession(
        async (
          session,
          name: string,
          newName: string,
          options: LongWorkOptions & { keepIdentity?: true },
        ) => {
          const operation = await session.viper.cloneVm({
            params: { vm: name },
            body: { name: newName, ...(options.keepIdentity ? { identity: 'keep' as const } : {}) },
            signal: session.signal,
          });
          await finish(session, operation, options, () => `VM ${newName} is a clone of ${name}.`);
        },
      ),
    );

  addLongWorkOptions(addCommand(vm, 'delete <vm>', 'delete a VM and its disk', 'viper vm delete web --force'))
    .option('-f, --force', 'also one that runs')
    .action(
      withSession(async (session, name: string, options: LongWorkOptions & { force?: true }) => {
        const operation = await session.viper.deleteVm({
          params: { vm: name },
          ...(options.force ? { query: { force: true } } : {}),
          signal: session.signal,
        });
        await finish(session, operation, options, () => `VM ${name} is deleted.`);
      }),
    );

  addVmMigrateCommands(vm);
  addVmConsoleCommands(vm);
  addVmGuestCommands(vm);
}

type SimpleAction = 'startVm' | 'pauseVm' | 'resumeVm';
const simpleActions: [word: string, action: SimpleAction, summary: string, done: string][] = [
  ['start', 'startVm', 'start a VM', 'running'],
  ['pause', 'pauseVm', 'stop the vCPUs of a VM; its memory stays', 'paused'],
  ['resume', 'resumeVm', 'let the vCPUs of a paused VM go on', 'running'],
];

function addStateCommands(vm: Command): void {
  for (const [word, action, summary, done] of simpleActions) {
    addLongWorkOptions(addCommand(vm, `${word} <vm>`, summary, `viper vm ${word} web`)).action(
      withSession(async (session: Session, name: string, options: LongWorkOptions) => {
        const operation: Operation = await session.viper[action]({
          params: { vm: name },
          signal: session.signal,
        });
        await finish(session, operation, options, () => `VM ${name} is ${done}.`);
      }),
    );
  }

  addLongWorkOptions(
    addCommand(
      vm,
      'stop <vm>',
      'stop a VM: through its guest agent or ACPI, and by force after the grace time',
      'viper vm stop web --grace 2m',
    ),
  )
    .option('-f, --force', 'do not ask the guest first')
    .option('--grace <time>', 'how long the guest may take (30s if absent)', parseDuration)
    .action(
      withSession(
        async (session, name: string, options: LongWorkOptions & { force?: true; grace?: number }) => {
          const { force, grace } = options;
          const operation = await session.viper.stopVm({
            params: { vm: name },
            body: { ...(force ? { force } : {}), ...(grace === undefined ? {} : { graceMs: grace }) },
            signal: session.signal,
          });
          await finish(session, operation, options, () => `VM ${name} is stopped.`);
        },
      ),
    );
}

function factsOf(vm: Vm): [string, string | undefined][] {
  const { spec, origin, lastExit, stalled } = vm;
  return [
    ['Name', vm.name],
    ['Id', vm.id],
    ['State', paintState(vm.state)],
    ['Stalled', stalled && `${stalled.reason}, since ${formatTime(stalled.at)}; it goes on by itself`],
    ['Allowed now', vm.allowedActions.join(', ')],
    ['Operation', vm.operationId],
    ['Created', formatTime(vm.createdAt)],
    [
      'From',
      origin && `${origin.kind} ${origin.kind === 'clone' ? `of VM ${origin.vmId}` : origin.snapshotId}`,
    ],
    ['Tenant', vm.tenant],
    ['Image', spec.disk.image],
    [
      'Disk',
      [formatBytes(spec.disk.sizeBytes), spec.disk.storage && `on ${spec.disk.storage}`]
        .filter(Boolean)
        .join(' '),
    ],
    ['Memory', formatBytes(spec.memoryBytes)],
    ['CPUs', `${spec.cpu.count} (${spec.cpu.model})`],
    ['Machine', `${spec.machine}, ${vm.runningWith ?? spec.accelerator}`],
    ['Nets', spec.nets.map(({ network, mac }) => `${network} ${mac}`).join(', ')],
    ['QEMU pid', vm.pid?.toString()],
    ['Last exit', lastExit && `${lastExit.reason} at ${formatTime(lastExit.at)}: ${lastExit.detail}`],
  ];
}
