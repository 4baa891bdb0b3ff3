/**
 * What every command that talks to a daemon starts from: the client, the output and a signal for Ctrl-C. The
 * options that all of them share are declared here too.
 */
import { Command, Option } from 'commander';
import { connectNode, type NodeViper } from '../sdk/node.ts';
import { Interrupted, UsageError } from './failures.ts';
import { createOutput, type Output, type OutputOptions } from './output.ts';
import { resolveTarget, type TargetOptions } from './target.ts';

export interface Session {
  viper: NodeViper;
  output: Output;
  /** Aborted by Ctrl-C; pass it to every call. */
  signal: AbortSignal;
}

export type CommonOptions = OutputOptions & TargetOptions;

const group = 'Options of every command:';
const commonOptions = () => [
  new Option('--json', "print the API's JSON").helpGroup(group),
  new Option('-q, --quiet', 'no progress and no remarks').helpGroup(group),
  new Option('--context <context>', 'a daemon of `viper context list`').helpGroup(group),
  new Option('--url <url>', 'the daemon (VIPER_URL)').helpGroup(group),
  new Option('--token <token>', 'bearer token (better: VIPER_TOKEN or --token-file)').helpGroup(group),
  new Option('--token-file <file>', 'file with the token; - reads it from stdin').helpGroup(group),
  new Option('--ca <file>', "PEM of the fleet's CA (VIPER_CA)").helpGroup(group),
];

/** To the program and to every command below it that acts; they come last in its help. */
export function addCommonOptions(command: Command): void {
  for (const each of command.commands) addCommonOptions(each);
  if (command.parent && command.commands.length > 0) return;
  for (const option of commonOptions()) command.addOption(option);
}

export const withExample = (command: Command, example: string): Command =>
  command.addHelpText('after', `\nExample:\n${example.replace(/^/gm, '  $ ')}`);

/** A command that talks to the daemon: `usage` is its name and arguments. */
export function addCommand(parent: Command, usage: string, summary: string, example: string): Command {
  return withExample(parent.command(usage).description(summary), example);
}

/** A word that has commands under it. */
export const addGroup = (parent: Command, name: string, summary: string): Command =>
  parent.command(name).description(summary);

/** Common options may stand before the first word as well; those nearer to the end count. */
export function optionsOf(command: Command): CommonOptions {
  const chain: Command[] = [];
  for (let each: Command | null = command; each; each = each.parent) chain.unshift(each);
  return Object.assign({}, ...chain.map((each) => each.opts()));
}

/** An action with a session that is closed at its end, whatever it comes to. */
export function withSession<A extends unknown[]>(run: (session: Session, ...rest: A) => Promise<void>) {
  return async (...all: unknown[]): Promise<void> => {
    const command = all.at(-1);
    if (!(command instanceof Command)) throw new Error('An action was called without its command');
    const options = optionsOf(command);
    const stop = new AbortController();
    const onInterrupt = () => stop.abort(new Interrupted());
    process.once('SIGINT', onInterrupt);
    const viper = connectTo(options);
    try {
      await run({ viper, output: createOutput(options), signal: stop.signal }, ...(all.slice(0, -1) as A));
    } finally {
      process.removeListener('SIGINT', onInterrupt);
      await viper.close();
    }
  };
}

export function connectTo(options: TargetOptions): NodeViper {
  try {
    return connectNode(resolveTarget(options));
  } catch (error) {
    // A URL that is none.
    throw error instanceof TypeError ? new UsageError(error.message, { cause: error }) : error;
  }
}
