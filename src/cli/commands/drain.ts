/** `viper drain` and `viper undrain`: a cloudlet is emptied, for maintenance say, and comes back. */
import { type Command, Option } from 'commander';
import type { Drain } from '../../sdk/client.ts';
import { addLongWorkOptions, finish, type LongWorkOptions } from '../progress.ts';
import { addCommand, type Session, withSession } from '../session.ts';
import { parseCount, parseDuration } from '../values.ts';

interface DrainOptions extends LongWorkOptions {
  to?: string[];
  parallel?: number;
  order?: NonNullable<Drain['order']>;
  deadline?: number;
}

export function addDrainCommands(program: Command): void {
  addLongWorkOptions(
    addCommand(
      program,
      'drain',
      'move every running VM to peers that have room, and take none until undrained',
      'viper drain --to edge2 edge3 --parallel 4',
    ),
  )
    .option('--to <peer...>', 'only to these cloudlets')
    .option(
      '--deadline <time>',
      'to be empty by then, such as 60s: chooses order and engine, or says that it cannot',
      parseDuration,
    )
    .option('--parallel <number>', 'VMs at one time (2 if absent)', parseCount)
    .addOption(
      new Option('--order <order>', 'which go first (smallest if absent)').choices([
        'smallest',
        'largest',
        'oldest',
      ]),
    )
    .action(withSession(drain));

  addCommand(
    program,
    'undrain',
    'take VMs again; a drain that still runs is cancelled',
    'viper undrain',
  ).action(
    withSession(async ({ viper, output, signal }) => {
      await viper.undrainCloudlet({ signal });
      output.say('The cloudlet takes VMs again.');
    }),
  );
}

async function drain(
  session: Session,
  { to, parallel, order, deadline, ...waiting }: DrainOptions,
): Promise<void> {
  const operation = await session.viper.drainCloudlet({
    body: {
      ...(to ? { to } : {}),
      ...(parallel === undefined ? {} : { parallel }),
      ...(order ? { order } : {}),
      ...(deadline === undefined ? {} : { deadlineMs: deadline }),
    },
    signal: session.signal,
  });
  await finish(session, operation, waiting, ({ result }) =>
    result?.moved
      ? `Moved: ${result.moved}. The cloudlet is drained.`
      : 'There was nothing to move. The cloudlet is drained.',
  );
}
