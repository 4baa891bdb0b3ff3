/** `viper operation …` and `viper events`: what the cloudlet is doing. */
import type { Command } from 'commander';
import type { Operation, ViperEvent } from '../../sdk/client.ts';
import { formatAge, formatTime, paintState } from '../output.ts';
import { follow } from '../progress.ts';
import { addCommand, addGroup, withSession } from '../session.ts';
import { parseCount, parseDuration } from '../values.ts';
import { listAll } from './lists.ts';

export function addOperationCommands(program: Command): void {
  const operation = addGroup(program, 'operation', 'long work: what runs and what has ended');

  addCommand(operation, 'list', 'all operations, oldest first', 'viper operation list').action(
    withSession((session) =>
      listAll(
        session,
        session.viper.listOperations,
        ['ID', 'KIND', 'SUBJECT', 'STATE', 'PROGRESS', 'AGE'],
        (each) => [
          each.id,
          each.kind,
          subjectOf(each),
          paintState(each.state),
          each.error?.code ?? progressOf(each),
          formatAge(each.createdAt),
        ],
        'There are no operations.',
      ),
    ),
  );

  addCommand(operation, 'show <operation>', 'one operation', 'viper operation show ID').action(
    withSession(async ({ viper, output, signal }, id: string) => {
      const found = await viper.getOperation({ params: { operation: id }, signal });
      output.show(found, () => output.facts(factsOf(found)));
    }),
  );

  addCommand(
    operation,
    'watch <operation>',
    'wait for its end and show its progress',
    'viper operation watch ID',
  )
    .option('--timeout <time>', 'how long to wait', parseDuration)
    .action(
      withSession(async (session, id: string, options: { timeout?: number }) => {
        const ended = await follow(session, id, options.timeout);
        session.output.show(ended, () =>
          session.output.say(`${ended.kind} ${subjectOf(ended)} has succeeded.`),
        );
      }),
    );

  addCommand(
    operation,
    'cancel <operation>',
    'cancel an operation; what it had made is undone',
    'viper operation cancel ID',
  ).action(
    withSession(async ({ viper, output, signal }, id: string) => {
      const cancelled = await viper.cancelOperation({ params: { operation: id }, signal });
      output.show(cancelled, () => output.say(`Operation ${id} is being cancelled.`));
    }),
  );

  addCommand(
    program,
    'events',
    'what happens on the cloudlet, as it happens; with --json one event a line',
    'viper events --after 0 --json',
  )
    .option('--after <id>', 'first those after this event; 0 for all that are kept', parseCount)
    .action(
      withSession(async ({ viper, output, signal }, options: { after?: number }) => {
        for await (const event of viper.events({ ...options, signal })) {
          output.line(output.json ? JSON.stringify(event) : eventLine(event));
        }
      }),
    );
}

const subjectOf = ({ subject }: Operation): string =>
  subject.name ?? subject.vmId ?? subject.snapshotId ?? subject.imageDigest ?? '';

const progressOf = ({ state, progress }: Operation): string =>
  state === 'running' && progress
    ? `${progress.phase} ${Math.floor((100 * progress.done) / Math.max(progress.total, 1))}%`
    : '';

const factsOf = (operation: Operation): [string, string | undefined][] => [
  ['Id', operation.id],
  ['Kind', operation.kind],
  ['Subject', subjectOf(operation)],
  ['State', paintState(operation.state)],
  ['Progress', progressOf(operation)],
  ['Error', operation.error && `${operation.error.code}: ${operation.error.message}`],
  ...Object.entries(operation.result ?? {}).map(([name, value]): [string, string] => [
    `Result ${name}`,
    value,
  ]),
  ['Begun', formatTime(operation.createdAt)],
  ['Ended', formatTime(operation.finishedAt)],
];

const eventLine = ({ id, at, kind, vmId, data }: ViperEvent): string =>
  [formatTime(at), id, kind, vmId, Object.keys(data).length > 0 ? JSON.stringify(data) : undefined]
    .filter((part) => part !== undefined)
    .join(' ');
