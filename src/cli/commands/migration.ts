/** `viper migration …`: the migrations from and to the cloudlet, those that run and those that were. */
import { type Command, Option } from 'commander';
import { type Migration, ViperError } from '../../sdk/client.ts';
import { UsageError } from '../failures.ts';
import { followMigration, summaryOf } from '../follow-migration.ts';
import { progressText } from '../migration-progress.ts';
import { formatAge, formatBitRate, formatDuration, formatTime, paintState } from '../output.ts';
import { addCommand, addGroup, type Session, withSession } from '../session.ts';
import { parseDuration, rateOrNone } from '../values.ts';
import { listAll } from './lists.ts';
import { withUnit } from './vm-migrate.ts';

export function addMigrationCommands(program: Command): void {
  const migration = addGroup(
    program,
    'migration',
    'moves of VMs between cloudlets: what runs and what has ended',
  );

  addCommand(migration, 'list', 'all migrations, oldest first', 'viper migration list').action(
    withSession((session) =>
      listAll(
        session,
        session.viper.listMigrations,
        ['ID', 'VM', 'WAY', 'MODE', 'STATE', 'TIME', 'DOWNTIME', 'AGE'],
        (each) => [
          each.id,
          each.vm.name,
          wayOf(each),
          each.options.mode,
          paintState(each.state),
          each.result ? formatDuration(each.result.totalMs) : '',
          each.result?.downtimeMs === undefined ? '' : formatDuration(each.result.downtimeMs),
          formatAge(each.createdAt),
        ],
        'There are no migrations. Move a VM: viper vm migrate VM --to PEER',
      ),
    ),
  );

  addCommand(migration, 'show <migration>', 'one migration', 'viper migration show ID').action(
    withSession(async ({ viper, output, signal }, id: string) => {
      const found = await viper.getMigration({ params: { migration: id }, signal });
      output.show(found, () => output.facts(factsOf(found)));
    }),
  );

  addCommand(
    migration,
    'watch <migration>',
    'wait until it is over and show how far it is',
    'viper migration watch ID',
  )
    .option('--timeout <time>', 'how long to wait', parseDuration)
    .action(
      withSession(async (session, id: string, { timeout }: { timeout?: number }) => {
        const ended = await followMigration(session, id, timeout);
        session.output.show(ended, () => session.output.say(summaryOf(ended)));
      }),
    );

  addCommand(
    migration,
    'limit <migration>',
    'change what a migration may take, while it runs; at its source',
    'viper migration limit ID --bandwidth 50M --downtime 500ms',
  )
    .option('--downtime <time>', 'the pause that pre-copy may plan for', parseDuration)
    .option('--bandwidth <rate>', 'most bits per second, such as 100M; none takes the limit away', rateOrNone)
    .addOption(
      new Option(
        '--auto-converge <whether>',
        'slow the guest down if it writes faster than the link carries',
      ).choices(['on', 'off']),
    )
    .action(withSession(limit));

  addCommand(
    migration,
    'pause <migration>',
    'send nothing for now; the VM runs on. Ends when the VM stops for its switchover',
    'viper migration pause ID',
  ).action(
    withSession((session, id: string) => change(session, id, (limits) => ({ ...limits, paused: true }))),
  );

  addCommand(migration, 'resume <migration>', 'go on after a pause', 'viper migration resume ID').action(
    withSession((session, id: string) => change(session, id, (limits) => ({ ...limits, paused: false }))),
  );

  addCommand(
    migration,
    'cancel <migration>',
    'end it; the VM stays where it is. Not possible once the VM is handed over',
    'viper migration cancel ID',
  ).action(withSession(cancel));
}

interface LimitOptions {
  downtime?: number;
  bandwidth?: number | 'none';
  autoConverge?: 'on' | 'off';
}

async function limit(
  session: Session,
  id: string,
  { downtime, bandwidth, autoConverge }: LimitOptions,
): Promise<void> {
  if (downtime === undefined && bandwidth === undefined && autoConverge === undefined)
    throw new UsageError('Pass --bandwidth, --downtime or --auto-converge, to say what is to change');
  await change(session, id, ({ bandwidthBps, ...limits }) => {
    const wanted = bandwidth ?? bandwidthBps;
    return {
      ...limits,
      ...(downtime === undefined ? {} : { downtimeMs: downtime }),
      ...(wanted === undefined || wanted === 'none' ? {} : { bandwidthBps: wanted }),
      ...(autoConverge === undefined ? {} : { autoConverge: autoConverge === 'on' }),
    };
  });
}

async function change(
  { viper, output, signal }: Session,
  id: string,
  changeLimits: (limits: Limits) => Limits,
): Promise<void> {
  const { options } = await viper.getMigration({ params: { migration: id }, signal });
  const changed = await viper.limitMigration({
    params: { migration: id },
    body: changeLimits(options.limits),
    signal,
  });
  output.show(changed, () => output.say(`The limits of migration ${id} are now: ${limitsOf(changed)}.`));
}

/** It is the operation that is cancelled. */
async function cancel({ viper, output, signal }: Session, id: string): Promise<void> {
  for await (const { id: operation, state, subject } of viper.pages(viper.listOperations, {
    limit: 200,
    signal,
  })) {
    if (state !== 'running' || subject.migrationId !== id) continue;
    const cancelled = await viper.cancelOperation({ params: { operation }, signal });
    return output.show(cancelled, () => output.say(`Migration ${id} is being cancelled.`));
  }
  const { role, state, over, peer } = await viper.getMigration({ params: { migration: id }, signal });
  const why = over
    ? `it is over: ${state}`
    : role === 'destination'
      ? `that is done at its source, ${peer.name}`
      : `no operation of this daemon runs it, and it is ${state}`;
  throw new ViperError('wrong_state', `Migration ${id} cannot be cancelled: ${why}`, { details: { state } });
}

type Limits = Migration['options']['limits'];

const wayOf = ({ role, peer }: Migration): string =>
  role === 'source' ? `to ${peer.name}` : `from ${peer.name}`;

function limitsOf({ options: { limits } }: Migration): string {
  const { downtimeMs, bandwidthBps, autoConverge, paused } = limits;
  return [
    `downtime ${formatDuration(downtimeMs)}`,
    bandwidthBps === undefined ? 'no limit of bandwidth' : formatBitRate(bandwidthBps),
    ...(autoConverge ? ['auto-converge'] : []),
    ...(paused ? ['paused'] : []),
  ].join(', ');
}

/** What is nested stands under the names of both. */
function resultFacts(prefix: string, result: object): [string, string][] {
  return Object.entries(result).flatMap(([name, value]): [string, string][] => {
    if (typeof value === 'object') return resultFacts(`${prefix} ${name}`, value);
    return [[`${prefix} ${name}`, typeof value === 'number' ? withUnit(name, value) : String(value)]];
  });
}

function factsOf(migration: Migration): [string, string | undefined][] {
  const { vm, options, progress, result, failure, attention, over } = migration;
  return [
    ['Id', migration.id],
    ['VM', `${vm.name} ${vm.id}`],
    ['Way', wayOf(migration)],
    ['Mode', options.mode],
    ['Engine', options.engine],
    ['Limits', limitsOf(migration)],
    ['State', paintState(migration.state)],
    ['Progress', over ? undefined : progress && progressText(progress)],
    [
      'Forecast downtime',
      over || progress?.forecastDowntimeMs === undefined
        ? undefined
        : formatDuration(progress.forecastDowntimeMs),
    ],
    ['Attention', attention],
    ['Failure', failure && `${failure.code}: ${failure.message}`],
    ...resultFacts('Result', result ?? {}),
    ['Begun', formatTime(migration.createdAt)],
    ['Ended', formatTime(migration.finishedAt)],
  ];
}
