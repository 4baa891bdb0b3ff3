/** `viper vm migrate` and `viper vm claim`: a VM moves, or its owner is settled by hand. */
import { type Command, Option } from 'commander';
import { migrationEngines, migrationModes } from '../../model/migration.ts';
import { formatBytes } from '../../model/units.ts';
import { type Continuity, continuities } from '../../model/vm.ts';
import { type MigrateVm, type MigrationPlan, ViperError } from '../../sdk/client.ts';
import { UsageError } from '../failures.ts';
import { followMerge, followOperation, summaryOf } from '../follow-migration.ts';
import { formatBitRate, formatDuration } from '../output.ts';
import { addLongWorkOptions, follow, type LongWorkOptions } from '../progress.ts';
import { addCommand, type Session, withSession } from '../session.ts';
import { parseBitRate, parseCount, parseDuration } from '../values.ts';

const storages = ['auto', 'shared', 'copied'] as const;

const engines = [...migrationEngines, 'auto'] as const;

interface MigrateOptions extends LongWorkOptions {
  to: string;
  mode?: (typeof migrationModes)[number];
  storage?: (typeof storages)[number];
  channels?: number;
  engine?: (typeof engines)[number];
  relays?: string;
  replicas?: number;
  custodian?: string;
  downtime?: number;
  bandwidth?: number;
  autoConverge?: true;
  continuity?: Continuity;
  device?: string;
  dryRun?: true;
  explain?: true;
}

export function addVmMigrateCommands(vm: Command): void {
  addLongWorkOptions(
    addCommand(
      vm,
      'migrate <vm>',
      'move a VM to another cloudlet while it runs',
      'viper vm migrate web --to edge2 --bandwidth 200M\nviper vm migrate web --to edge2 --explain',
    ),
  )
    .requiredOption('--to <peer>', 'name or id of the other cloudlet')
    .addOption(
      new Option(
        '--mode <mode>',
        'auto: pre-copy while it gains on the guest, else post-copy (if absent as is best for the engine)',
      ).choices(migrationModes),
    )
    .addOption(
      new Option(
        '--engine <engine>',
        'condensed: send only what the other side cannot know; direct: all of it; auto (default): what is sooner done; ' +
          'relayed: other cloudlets hold what the destination has not taken yet, so this one is free sooner',
      ).choices(engines),
    )
    .option(
      '--relays <peers>',
      'relayed: names of those that may hold memory, and a disk, such as a,b (all that lend some)',
    )
    .option('--replicas <number>', 'relayed: how many hold each part (2 if absent)', parseCount)
    .option(
      '--custodian <peer>',
      'relayed: a third cloudlet that may go on with the VM, if the other one is lost before it has all of it',
    )
    .addOption(
      new Option(
        '--storage <storage>',
        'shared: only memory moves; copied: the disk, too; auto (default): shared where both sides have its storage',
      ).choices(storages),
    )
    .option(
      '--channels <number>',
      'parallel streams of memory besides the main one; precopy only',
      parseCount,
    )
    .option('--downtime <time>', 'the pause that pre-copy may plan for (300ms if absent)', parseDuration)
    .option('--bandwidth <rate>', 'most bits per second, such as 100M (no limit if absent)', parseBitRate)
    .option('--auto-converge', 'slow the guest down if it writes faster than the link carries')
    .addOption(
      new Option(
        '--continuity <way>',
        "how its clients' connections go on (as the VM was made for if absent)",
      ).choices(continuities),
    )
    .option('--device <address>', "of the VM's device in the network of the destination")
    .option('--dry-run', 'only say what does not fit, or what it would cost')
    .option('--explain', 'the same: which engine would carry it and why, and what it would cost')
    .action(withSession(migrate));

  addCommand(
    vm,
    'claim <vm>',
    'say that this cloudlet owns a VM whose migration hangs because the other one is gone',
    'viper vm claim web --reason "edge2 burnt down" --force\n' +
      'viper vm claim web --from MIGRATION --reason "edge2 burnt down" --force',
  )
    .option(
      '--from <migration>',
      'go on with a VM that this cloudlet is the custodian of (viper escrow list), as it left its source',
    )
    .requiredOption('--reason <text>', 'for the audit')
    .option('-f, --force', 'you have made sure that the other cloudlet will not run it')
    .action(
      withSession(async (session, name: string, { reason, force, from }: ClaimOptions) => {
        if (!force) throw new UsageError(from ? dangerOfRescue(name) : dangerOfClaim(name));
        const { viper, output, signal } = session;
        if (from) {
          const body = { vm: name, reason };
          const operation = await viper.claimEscrow({ params: { migration: from }, body, signal });
          const ended = await follow(session, operation);
          return output.show(ended, () =>
            output.say(`VM ${name} belongs to this cloudlet, and is as it left its source.`),
          );
        }
        const claimed = await viper.claimVm({ params: { vm: name }, body: { reason }, signal });
        output.show(claimed, () =>
          output.say(`VM ${name} belongs to this cloudlet, and is ${claimed.state}.`),
        );
      }),
    );
}

interface ClaimOptions {
  reason: string;
  force?: true;
  from?: string;
}

const dangerOfRescue = (name: string): string =>
  `Not claimed: if the other cloudlet still runs VM '${name}', there are two of it until it hears of this.\n` +
  '  What the VM did since it left its source, also on its disk, is gone when it goes on here.\n' +
  '  Make sure first that the other cloudlet is gone for good, or that its QEMU is ended; then repeat with --force.';

const dangerOfClaim = (name: string): string =>
  `Not claimed: if the other cloudlet runs VM '${name}' too, or ever starts it again, there are two of it, ` +
  'and each writes what the other never sees.\n' +
  '  Make sure first that the other cloudlet is gone for good, or that its QEMU is ended; then repeat with --force.\n' +
  '  If it only cannot be reached, wait: the migration goes on by itself when it answers.';

async function migrate(session: Session, name: string, options: MigrateOptions): Promise<void> {
  const { viper, output, signal } = session;
  const { to, mode, storage, channels, engine, downtime, bandwidth, autoConverge, continuity, device } =
    options;
  const { relays, replicas, custodian } = options;
  const limits: NonNullable<MigrateVm['limits']> = {
    ...(downtime === undefined ? {} : { downtimeMs: downtime }),
    ...(bandwidth === undefined ? {} : { bandwidthBps: bandwidth }),
    ...(autoConverge ? { autoConverge } : {}),
  };
  const body: MigrateVm = {
    to,
    ...(mode ? { mode } : {}),
    ...(storage ? { storage } : {}),
    ...(channels === undefined ? {} : { channels }),
    ...(engine ? { engine } : {}),
    ...(relays ? { relays: relays.split(',') } : {}),
    ...(replicas === undefined ? {} : { replicas }),
    ...(custodian ? { custodian } : {}),
    ...(continuity ? { continuity } : {}),
    ...(device ? { device } : {}),
    ...(Object.keys(limits).length > 0 ? { limits } : {}),
  };
  if (options.dryRun || options.explain) {
    const plan = await viper.planMigration({ params: { vm: name }, body, signal });
    return showPlan(session, name, to, plan);
  }
  const operation = await viper.migrateVm({ params: { vm: name }, body, signal });
  if (!options.wait) return output.show(operation, () => output.line(operation.id));
  const moved = await followOperation(session, operation, options.timeout);
  const ended = await followMerge(session, moved, options.timeout);
  output.show(ended, () => output.say(summaryOf(ended)));
}

/** A VM that does not fit ends with the exit code of the refusal that the migration would meet. */
function showPlan({ output }: Session, name: string, to: string, plan: MigrationPlan): void {
  const { problems, engine, forecast } = plan;
  if (problems.length > 0) {
    const error = new ViperError('migration_refused', `VM '${name}' cannot go to ${to}`, {
      details: { problems },
    });
    if (!output.json) throw error;
    output.show(plan, () => {});
    throw error;
  }
  output.show(plan, () => {
    output.say(`VM ${name} fits ${to}.`);
    if (!forecast) return;
    output.facts([
      ['Engine', engine && `${engine.engine}, ${engine.mode}: ${engine.reason}`],
      ['Time', formatDuration(forecast.totalMs)],
      ['Downtime', formatDuration(forecast.downtimeMs)],
      ['Bytes', formatBytes(forecast.bytes)],
      [
        'Converges',
        engine?.mode === 'postcopy'
          ? undefined
          : forecast.converges
            ? 'yes'
            : 'no: pre-copy alone would not end',
      ],
      ...Object.entries(forecast.inputs).map(([input, value]): [string, string] => [
        `From ${inputNames[input] ?? input}`,
        withUnit(input, value),
      ]),
    ]);
  });
}

/** What the API calls them, as people do. */
const inputNames: Record<string, string> = {
  memoryBytes: 'memory',
  zeroBytes: 'zeroes in it',
  diskBytes: 'disk to send',
  dirtyBps: 'what the guest writes',
  bandwidthBps: 'the rate of the link',
  rttMs: 'the round trip',
  downtimeLimitMs: 'the longest pause',
  learnedFrom: 'migrations before',
};

/** Units stand last in names. */
export function withUnit(name: string, value: number): string {
  if (name.endsWith('Bytes')) return formatBytes(value);
  if (name.endsWith('Bps')) return formatBitRate(value);
  if (name.endsWith('Ms')) return formatDuration(value);
  if (name.endsWith('Percent')) return `${value} %`;
  return String(value);
}
