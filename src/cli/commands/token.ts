/** `viper token …`: credentials. A secret goes to stdout alone, so that it can go into a file. */
import { type Command, InvalidArgumentError } from 'commander';
import type { Scope, Token } from '../../sdk/client.ts';
import { fingerprintOf } from '../../sdk/node.ts';
import { UsageError } from '../failures.ts';
import { formatAge, formatTime } from '../output.ts';
import { addCommand, addGroup, withSession } from '../session.ts';
import { parseSeconds, readText } from '../values.ts';
import { listAll } from './lists.ts';

const scopes: readonly Scope[] = ['admin', 'operate', 'read', 'device'];

function collectScope(value: string, before: Scope[] = []): Scope[] {
  const scope = scopes.find((each) => each === value);
  if (!scope) throw new InvalidArgumentError(`Wanted one of ${scopes.join(', ')}.`);
  return before.includes(scope) ? before : [...before, scope];
}

interface CreateOptions {
  name: string;
  scope: Scope[];
  expires?: number;
  certificate?: string;
}

export function addTokenCommands(program: Command): void {
  const token = addGroup(program, 'token', 'credentials: bearer tokens and client certificates');

  addCommand(token, 'list', 'all credentials, never their secrets', 'viper token list').action(
    withSession((session) =>
      listAll(
        session,
        session.viper.listTokens,
        ['NAME', 'KIND', 'SCOPES', 'STATE', 'EXPIRES', 'LAST USED', 'ID'],
        (each) => [
          each.name,
          each.kind,
          each.scopes.join(','),
          stateOf(each),
          formatTime(each.expiresAt) ?? 'never',
          each.lastUsedAt ? `${formatAge(each.lastUsedAt)} ago` : 'never',
          each.id,
        ],
        'There are no credentials.',
      ),
    ),
  );

  addCommand(
    token,
    'create',
    'make a bearer token, or register a client certificate',
    'viper token create --name ci --scope operate --expires 30d > ci.token\n' +
      'viper token create --name robot --scope read --certificate robot.pem',
  )
    .requiredOption('--name <text>', 'what it is for')
    .requiredOption('--scope <scope>', `${scopes.join(', ')}; may be repeated`, collectScope)
    .option('--expires <time>', 'its life, such as 30d; without end if absent', parseSeconds)
    .option('--certificate <file>', 'PEM of a client certificate that is to be let in, instead of a token')
    .action(
      withSession(async ({ viper, output, signal }, options: CreateOptions) => {
        const { name, scope, expires, certificate } = options;
        const created = await viper.createToken({
          body: {
            name,
            scopes: scope,
            ...(expires === undefined ? {} : { expiresInS: expires }),
            ...(certificate === undefined ? {} : { certificateFingerprint: fingerprintOfFile(certificate) }),
          },
          signal,
        });
        output.show(created, () => {
          if (created.secret === undefined)
            return output.say(`Credential ${name} is registered (${created.token.id}).`);
          output.note('The token is shown this once:');
          output.line(created.secret);
        });
      }),
    );

  addCommand(token, 'revoke <token>', 'revoke a credential at once', 'viper token revoke ID').action(
    withSession(async ({ viper, output, signal }, id: string) => {
      await viper.revokeToken({ params: { token: id }, signal });
      output.say(`Token ${id} is revoked.`);
    }),
  );
}

function fingerprintOfFile(file: string): string {
  const pem = readText(file, '--certificate');
  try {
    return fingerprintOf(pem);
  } catch (error) {
    throw new UsageError(
      `'${file}', which --certificate names, is no PEM certificate: ${(error as Error).message}`,
    );
  }
}

function stateOf({ revokedAt, expiresAt }: Token): string {
  if (revokedAt) return 'revoked';
  return expiresAt && Date.parse(expiresAt) < Date.now() ? 'expired' : 'good';
}
