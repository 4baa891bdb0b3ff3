/**
 * `viper init`, `viper join` and `viper daemon` belong to the daemon's program, which runs as a child. The CLI
 * adds only that a cloudlet which was made becomes a context, and keeps a join token out of the child's arguments.
 */
import { readFileSync } from 'node:fs';
import type { Command } from 'commander';
import { runChild } from '../child.ts';
import { addContext, contextsFile } from '../contexts.ts';
import { createOutput } from '../output.ts';
import { withExample } from '../session.ts';
import { tokenOf } from '../target.ts';

/** What the daemon's `init --json` and `join --json` print. */
interface Made {
  id: string;
  name: string;
  url: string;
  caFile: string;
  /** SHA-256 of the fleet's CA. */
  caFingerprint: string;
  token?: string;
}

interface MakeOptions {
  state?: string;
  name: string;
  listen?: string;
  url?: string;
  json?: true;
  quiet?: true;
}

type JoinOptions = MakeOptions & { token?: string; tokenFile?: string };

export function addDaemonCommands(program: Command, daemonProgram: string): void {
  addMakeOptions(
    daemonCommand(
      program,
      'init',
      'make a cloudlet: identity, fleet CA, first admin token; becomes the current context',
      'viper init --state /var/lib/viper --name edge1 --listen 192.0.2.7:7443',
    ),
  ).action((options: MakeOptions) => make(daemonProgram, ['init'], options, {}));

  addMakeOptions(
    daemonCommand(
      program,
      'join <url>',
      'make a cloudlet that joins the fleet of the one at URL; becomes the current context',
      'viper join https://edge1:7443 --token-file join.token --state /var/lib/viper --name edge2 --listen 192.0.2.8:7443',
    ),
  )
    .option('--token <token>', 'join token of `viper join-token` (better: VIPER_JOIN_TOKEN or --token-file)')
    .option('--token-file <file>', 'file with the join token; - reads it from stdin')
    .action((url: string, options: JoinOptions) => {
      const token = tokenOf(options);
      return make(daemonProgram, ['join', url], options, token ? { VIPER_JOIN_TOKEN: token } : {});
    });

  stateOption(
    daemonCommand(program, 'daemon', 'run the daemon of a cloudlet', 'viper daemon --state /var/lib/viper'),
  )
    .option('--listen <host:port>', 'listen elsewhere than `viper init` was told')
    .action(async (options: { state?: string; listen?: string }) => {
      const end = await runChild(daemonProgram, ['serve', ...flags(options, 'state', 'listen')], 'inherit');
      process.exitCode = end.exitCode;
    });

  stateOption(
    daemonCommand(
      program,
      'admin-token',
      'make a new admin token while no daemon runs, for when all tokens are lost',
      'viper admin-token --state /var/lib/viper > admin.token',
    ),
  ).action(async (options: { state?: string }) => {
    const end = await runChild(daemonProgram, ['admin-token', ...flags(options, 'state')], 'inherit');
    process.exitCode = end.exitCode;
  });
}

const daemonCommand = (program: Command, usage: string, summary: string, example: string): Command =>
  withExample(
    program.command(usage).description(summary).helpGroup('The cloudlet on this machine:'),
    example,
  );

const stateOption = (command: Command): Command =>
  command.option('--state <dir>', 'directory of the cloudlet (VIPER_STATE)');

const addMakeOptions = (command: Command): Command =>
  stateOption(command)
    .requiredOption('--name <name>', 'its name in the fleet')
    .option('--listen <host:port>', 'where the daemon listens')
    .option('--url <url>', 'how others reach it; https://HOST:PORT of --listen if absent')
    .option('--json', 'print the result as JSON')
    .option('-q, --quiet', 'no remarks');

/** Options as arguments again. */
const flags = <K extends string>(options: { [P in K]?: string }, ...names: K[]): string[] =>
  names.flatMap((name) => (options[name] === undefined ? [] : [`--${name}`, options[name]]));

async function make(
  daemonProgram: string,
  words: string[],
  options: MakeOptions,
  environment: Record<string, string>,
): Promise<void> {
  const args = [...words, ...flags(options, 'state', 'name', 'listen', 'url'), '--json'];
  const { exitCode, stdout } = await runChild(daemonProgram, args, 'pipe', environment);
  if (exitCode !== 0) {
    process.exitCode = exitCode;
    return;
  }
  const made = JSON.parse(stdout) as Made;
  const file = contextsFile();
  addContext(file, made.name, {
    url: made.url,
    ca: readFileSync(made.caFile, 'utf8'),
    ...(made.token ? { token: made.token } : {}),
  });
  const output = createOutput(options);
  output.show(made, () => {
    output.facts([
      ['Cloudlet', `${made.name} (${made.id})`],
      ['URL', `${made.url}, docs at ${made.url}/docs`],
      ['Admin token', made.token],
      ['Fleet CA', made.caFile],
      ['Its SHA-256', made.caFingerprint],
    ]);
    const state = options.state ?? process.env.VIPER_STATE ?? 'DIR';
    output.note(
      `Context ${made.name} in ${file} is the current one. Start it: viper daemon --state ${state}`,
    );
  });
}
