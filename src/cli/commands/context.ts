/** `viper context …`: the daemons that this user knows. */
import type { Command } from 'commander';
import { connect } from '../../sdk/client.ts';
import { addContext, contextsFile, readContexts, writeContexts } from '../contexts.ts';
import { UsageError } from '../failures.ts';
import { createOutput, type OutputOptions } from '../output.ts';
import { addCommand, addGroup, type CommonOptions, optionsOf } from '../session.ts';
import { tokenOf } from '../target.ts';
import { readText } from '../values.ts';

export function addContextCommands(program: Command): void {
  const context = addGroup(program, 'context', 'the daemons that this user knows, with their tokens');

  addCommand(context, 'list', 'all contexts; never their tokens', 'viper context list').action(
    (_: OutputOptions, command: Command) => {
      const output = createOutput(optionsOf(command));
      const { current, contexts } = readContexts(contextsFile());
      const items = Object.entries(contexts).map(([name, { url, token, ca }]) => ({
        name,
        url,
        current: name === current,
        token: token !== undefined,
        ca: ca !== undefined,
      }));
      const yesNo = (value: boolean) => (value ? 'yes' : 'no');
      output.show({ items }, () =>
        output.table(
          ['', 'NAME', 'URL', 'TOKEN', 'CA'],
          items.map((each) => [
            each.current ? '*' : '',
            each.name,
            each.url,
            yesNo(each.token),
            yesNo(each.ca),
          ]),
          'There are no contexts. Make one: viper context add NAME --url URL --token-file FILE --ca FILE',
        ),
      );
    },
  );

  addCommand(context, 'use <context>', 'make a context the current one', 'viper context use edge1').action(
    (name: string, _: OutputOptions, command: Command) => {
      const file = contextsFile();
      const { contexts } = knownContext(file, name);
      writeContexts(file, { current: name, contexts });
      createOutput(optionsOf(command)).say(`The current context is ${name}.`);
    },
  );

  addCommand(
    context,
    'add <name>',
    'add a context, or replace the one of this name, and make it the current one',
    'viper context add edge1 --url https://edge1:7443 --token-file edge1.token --ca fleet-ca.pem',
  ).action((name: string, _: OutputOptions, command: Command) => {
    const options: CommonOptions = optionsOf(command);
    const url = checkedUrl(options.url ?? process.env.VIPER_URL);
    const token = tokenOf(options) ?? process.env.VIPER_TOKEN;
    const caFile = options.ca ?? process.env.VIPER_CA;
    const ca = caFile === undefined ? undefined : readText(caFile, '--ca');
    addContext(contextsFile(), name, { url, ...(token ? { token } : {}), ...(ca ? { ca } : {}) });
    createOutput(options).say(`Context ${name} is added and is the current one.`);
  });

  addCommand(context, 'remove <context>', 'forget a context', 'viper context remove edge1').action(
    (name: string, _: OutputOptions, command: Command) => {
      const file = contextsFile();
      const { current, contexts } = knownContext(file, name);
      const { [name]: _removed, ...rest } = contexts;
      writeContexts(file, { ...(current && current !== name ? { current } : {}), contexts: rest });
      createOutput(optionsOf(command)).say(`Context ${name} is removed.`);
    },
  );
}

function knownContext(file: string, name: string) {
  const all = readContexts(file);
  if (Object.hasOwn(all.contexts, name)) return all;
  const known = Object.keys(all.contexts).join(', ') || 'none';
  throw new UsageError(`There is no context '${name}' in ${file}; known: ${known}`);
}

function checkedUrl(url: string | undefined): string {
  if (url === undefined) throw new UsageError('Pass --url, such as https://edge1:7443');
  try {
    return connect({ url }).url;
  } catch (error) {
    throw new UsageError((error as Error).message, { cause: error });
  }
}
