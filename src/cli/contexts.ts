/**
 * The daemons that a user knows, in one file that only the user can read: it holds tokens. A change writes a
 * new file and renames it, so that a crash leaves the old one.
 */
import { chmodSync, mkdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { homedir } from 'node:os';
import { dirname, join } from 'node:path';
import { UsageError } from './failures.ts';

export interface Context {
  url: string;
  token?: string;
  /** PEM of the fleet's CA. */
  ca?: string;
}

export interface Contexts {
  current?: string;
  contexts: Record<string, Context>;
}

type Environment = Record<string, string | undefined>;

export function contextsFile(env: Environment = process.env): string {
  if (env.VIPER_CONFIG) return env.VIPER_CONFIG;
  const base = env.XDG_CONFIG_HOME?.startsWith('/') ? env.XDG_CONFIG_HOME : join(homedir(), '.config');
  return join(base, 'viper', 'config.json');
}

/** No contexts if there is no file yet. */
export function readContexts(file: string): Contexts {
  let text: string;
  try {
    text = readFileSync(file, 'utf8');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return { contexts: {} };
    throw new UsageError(`Cannot read the contexts in ${file}: ${(error as Error).message}`);
  }
  try {
    const value = JSON.parse(text) as Contexts;
    const entries = Object.entries(value.contexts);
    if (entries.every(([, context]) => typeof context.url === 'string')) return value;
  } catch {
    // Told below.
  }
  throw new UsageError(`The contexts in ${file} cannot be understood; mend the file or remove it`);
}

export function writeContexts(file: string, contexts: Contexts): void {
  const folder = dirname(file);
  mkdirSync(folder, { recursive: true, mode: 0o700 });
  const next = `${file}.${process.pid}`;
  try {
    writeFileSync(next, `${JSON.stringify(contexts, null, 2)}\n`, { mode: 0o600, flag: 'wx' });
    chmodSync(next, 0o600);
    renameSync(next, file);
  } finally {
    rmSync(next, { force: true });
  }
}

/** Adds a context or replaces the one of this name, and makes it the current one. */
export function addContext(file: string, name: string, context: Context): void {
  const { contexts } = readContexts(file);
  writeContexts(file, { current: name, contexts: { ...contexts, [name]: context } });
}
