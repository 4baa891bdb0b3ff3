/**
 * Shell completion: @bomb.sh/tab knows the commands and options; names come from the daemon, if it answers
 * within a moment. Completion never fails and never prints an error: it then offers less.
 */
import { type Dirent, readdirSync } from 'node:fs';
import { dirname, join } from 'node:path';
import type { RootCommand } from '@bomb.sh/tab';
import addCompletion from '@bomb.sh/tab/commander';
import type { Command } from 'commander';
import type { NodeViper } from '../sdk/node.ts';
import { contextsFile, readContexts } from './contexts.ts';
import { connectTo, withExample } from './session.ts';

interface Name {
  value: string;
  description: string;
}

const answerMs = 800;
const maxNames = 500;

/** The script wants a function of the package bash-completion, which a small system may lack. */
const withoutBashCompletion = `declare -F _get_comp_words_by_ref >/dev/null || _get_comp_words_by_ref() {
    cur=\${COMP_WORDS[COMP_CWORD]} prev=\${COMP_WORDS[COMP_CWORD-1]} words=("\${COMP_WORDS[@]}") cword=$COMP_CWORD
}
`;

/** Adds `completion SHELL` and the hidden `complete -- WORDS`, which the shells' scripts call. */
export function addCompletionCommands(program: Command): RootCommand {
  const completion = addCompletion(program, { completionCommandName: 'completion' });
  const command = program.commands.find((each) => each.name() === 'completion');
  if (command) {
    withExample(command.description('print a completion script'), 'source <(viper completion bash)');
    command.hook('preAction', (_, { args }) => {
      if (args[0] === 'bash') process.stdout.write(withoutBashCompletion);
    });
  }
  return completion;
}

/** What an argument or an option of this name takes, by the name that commands give it. */
const sources = {
  vm: (viper, signal) =>
    viper
      .listVms({ query: { limit: 200 }, signal })
      .then(({ items }) => items.map(({ name, state }) => named(name, state))),
  image: (viper, signal) =>
    viper
      .listImages({ query: { limit: 200 }, signal })
      .then(({ items }) =>
        items.flatMap(({ aliases, digest }) => aliases.map((alias) => named(alias, digest))),
      ),
  snapshot: (viper, signal) =>
    viper
      .listSnapshots({ query: { limit: 200 }, signal })
      .then(({ items }) => items.map(({ name, id }) => named(name, id))),
  operation: (viper, signal) =>
    viper
      .listOperations({ query: { limit: 200 }, signal })
      .then(({ items }) => items.map(({ id, kind, state }) => named(id, `${kind} ${state}`))),
  token: (viper, signal) =>
    viper
      .listTokens({ query: { limit: 200 }, signal })
      .then(({ items }) => items.map(({ id, name }) => named(id, name))),
  peer: (viper, signal) =>
    viper.listPeers({ signal }).then(({ items }) => items.map(({ id, name }) => named(id, name))),
  to: (viper, signal) =>
    viper.listPeers({ signal }).then(({ items }) => items.map(({ id, name }) => named(name, id))),
  device: (viper, signal) =>
    viper
      .listDevices({ query: { limit: 200 }, signal })
      .then(({ items }) => items.map(({ id, name }) => named(name, id))),
  migration: (viper, signal) =>
    viper
      .listMigrations({ query: { limit: 200 }, signal })
      .then(({ items }) => items.map(({ id, vm, state }) => named(id, `${vm.name} ${state}`))),
  type: (viper, signal) =>
    viper
      .listInstanceTypes({ signal })
      .then(({ items }) => items.map(({ name, cpus }) => named(name, `${cpus} vCPUs`))),
} satisfies Record<string, (viper: NodeViper, signal: AbortSignal) => Promise<Name[]>>;
type Source = keyof typeof sources;

const isSource = (name: string | undefined): name is Source =>
  name !== undefined && Object.hasOwn(sources, name);
const named = (value: string, description: string): Name => ({ value, description });
const fileOptions = ['ca', 'token-file', 'ssh-key', 'user-data', 'certificate', 'input', 'state'];

/** Puts the names that these words may go on with into the completion. */
export async function addNames(completion: RootCommand, words: string[]): Promise<void> {
  const last = words.at(-1) ?? '';
  const option = words.at(-2)?.startsWith('--') ? words.at(-2)?.slice(2) : undefined;
  // At most one question: what the option before takes, else what the group of commands is about.
  const source = isSource(option) ? option : words.find((word) => isSource(word));
  const names = isSource(source) ? await namesOf(source, words) : [];
  const offer = (all: Name[]) => (complete: (value: string, description: string) => void) => {
    for (const { value, description } of all.slice(0, maxNames)) complete(value, description);
  };
  for (const command of completion.commands.values()) {
    for (const argument of command.arguments.values()) {
      if (argument.name === source) argument.handler = offer(names);
      if (argument.name === 'context') argument.handler = offer(contextNames());
      if (argument.name === 'file') argument.handler = offer(filesAt(last));
    }
    for (const [key, each] of command.options) {
      if (key === source) each.handler = offer(names);
      if (key === 'context') each.handler = offer(contextNames());
      if (fileOptions.includes(key)) each.handler = offer(filesAt(last));
    }
  }
}

async function namesOf(source: Source, words: string[]): Promise<Name[]> {
  const typed = (option: string) => {
    const index = words.indexOf(option);
    return index >= 0 && index < words.length - 2 ? words[index + 1] : undefined;
  };
  const [context, url, ca] = ['--context', '--url', '--ca'].map(typed);
  try {
    await using viper = connectTo({
      ...(context ? { context } : {}),
      ...(url ? { url } : {}),
      ...(ca ? { ca } : {}),
    });
    return await sources[source](viper, AbortSignal.timeout(answerMs));
  } catch {
    return [];
  }
}

function contextNames(): Name[] {
  try {
    return Object.entries(readContexts(contextsFile()).contexts).map(([name, { url }]) => named(name, url));
  } catch {
    return [];
  }
}

/** Paths that begin with `text`. The only one, if it is a folder, brings its entries: so no space ends it. */
function filesAt(text: string): Name[] {
  const folder = text.endsWith('/') ? text : dirname(text);
  const written = text.includes('/') ? folder : '';
  const found = entriesOf(folder)
    .map((entry) => ({ path: join(written, entry.name), entry }))
    .filter(({ path }) => path.startsWith(text));
  const [only] = found;
  const inside = found.length === 1 && only?.entry.isDirectory() ? filesAt(`${only.path}/`) : [];
  return [...found.map(({ path, entry }) => named(entry.isDirectory() ? `${path}/` : path, '')), ...inside];
}

function entriesOf(folder: string): Dirent[] {
  try {
    return readdirSync(folder, { withFileTypes: true });
  } catch {
    return [];
  }
}
