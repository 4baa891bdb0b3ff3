/**
 * Which daemon a command talks to: options first, then the environment, then the context. A token and a CA of a
 * context go only to the URL of that context: another URL never sees them.
 */
import { type Context, contextsFile, readContexts } from './contexts.ts';
import { UsageError } from './failures.ts';
import { readText } from './values.ts';

export interface TargetOptions {
  context?: string;
  url?: string;
  token?: string;
  tokenFile?: string;
  /** File of the CA. */
  ca?: string;
}

type Environment = Record<string, string | undefined>;

export function resolveTarget(options: TargetOptions, env: Environment = process.env): Context {
  const given = options.url ?? (options.context ? undefined : env.VIPER_URL);
  const context = chosenContext(options, env, given !== undefined);
  const url = given ?? context?.url;
  if (!url) {
    throw new UsageError(
      'No daemon is known: pass --url, set VIPER_URL, or make a context with `viper init` or `viper context add`',
    );
  }
  const known = context && sameUrl(context.url, url) ? context : undefined;
  const token = tokenOf(options) ?? env.VIPER_TOKEN ?? known?.token;
  const caFile = options.ca ?? env.VIPER_CA;
  const ca = caFile ? readText(caFile, options.ca ? '--ca' : 'VIPER_CA') : known?.ca;
  return { url, ...(token ? { token } : {}), ...(ca ? { ca } : {}) };
}

/** The context by its name, or the current one; it may be missing if a URL was given. */
function chosenContext(options: TargetOptions, env: Environment, urlGiven: boolean): Context | undefined {
  const file = contextsFile(env);
  const { current, contexts } = readContexts(file);
  const name = options.context ?? current;
  if (name === undefined) return undefined;
  const context = Object.hasOwn(contexts, name) ? contexts[name] : undefined;
  if (context || (urlGiven && !options.context)) return context;
  const known = Object.keys(contexts);
  throw new UsageError(
    `There is no context '${name}' in ${file}; known: ${known.length > 0 ? known.join(', ') : 'none'}`,
  );
}

export function tokenOf(options: Pick<TargetOptions, 'token' | 'tokenFile'>): string | undefined {
  if (options.tokenFile === undefined) return options.token;
  if (options.token !== undefined) throw new UsageError('Pass either --token or --token-file, not both');
  const token = readText(options.tokenFile, '--token-file').trim();
  if (!/^\S+$/.test(token))
    throw new UsageError(`'${options.tokenFile}', which --token-file names, holds no token`);
  return token;
}

const sameUrl = (one: string, other: string): boolean =>
  one.replace(/\/+$/, '') === other.replace(/\/+$/, '');
