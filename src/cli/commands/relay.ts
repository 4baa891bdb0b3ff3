/** `viper relay`: memory and disk space that the cloudlet lends to the migrations of others. */
import type { Command } from 'commander';
import { formatBytes } from '../../model/units.ts';
import type { Relay } from '../../sdk/client.ts';
import type { Output } from '../output.ts';
import { addCommand, withSession } from '../session.ts';
import { parseSize } from '../values.ts';

export function addRelayCommands(program: Command): void {
  const relay = program
    .command('relay')
    .description('lend memory and disk space to the migrations of other cloudlets');

  addCommand(
    relay,
    'on',
    'lend memory, and disk space, as far as it is free when it is needed',
    'viper relay on --memory 4G --disk 20G',
  )
    .requiredOption('--memory <size>', 'the most that is lent, such as 4G', parseSize)
    .option(
      '--disk <size>',
      'the most of the disk that is lent, for disks that are not shared (none if absent)',
      parseSize,
    )
    .action(
      withSession(
        async ({ viper, output, signal }, { memory, disk = 0 }: { memory: number; disk?: number }) => {
          const body = { memoryBytes: memory, diskBytes: disk };
          show(output, await viper.lendMemory({ body, signal }));
        },
      ),
    );

  addCommand(
    relay,
    'off',
    'lend nothing more; what is held stays until its lease ends',
    'viper relay off',
  ).action(
    withSession(async ({ viper, output, signal }) => {
      show(output, await viper.lendMemory({ body: { memoryBytes: 0 }, signal }));
    }),
  );

  addCommand(relay, 'status', 'what is lent, and to which migrations', 'viper relay status').action(
    withSession(async ({ viper, output, signal }) => {
      show(output, await viper.getRelay({ signal }));
    }),
  );
}

function show(output: Output, relay: Relay): void {
  const { memoryBytes, usedBytes, freeBytes, disk, migrations } = relay;
  output.show(relay, () => {
    output.facts([
      ['Lends', memoryBytes > 0 ? `at most ${formatBytes(memoryBytes)}` : 'nothing'],
      ['Holds', formatBytes(usedBytes)],
      ['Would take', formatBytes(freeBytes)],
      ['Lends of its disk', disk.lentBytes > 0 ? `at most ${formatBytes(disk.lentBytes)}` : 'nothing'],
      ['Holds there', formatBytes(disk.usedBytes)],
      ['Would take there', formatBytes(disk.freeBytes)],
    ]);
    for (const { holds, migrationId, cloudlet, slabs, bytes } of migrations)
      output.say(
        `${formatBytes(bytes)} of ${holds} in ${slabs} slabs from ${cloudlet}, migration ${migrationId}`,
      );
  });
}
