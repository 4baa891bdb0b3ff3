/** For tests only: runs the CLI as a child process, away from the contexts of whoever runs the tests. */
import { type ChildProcess, spawn } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

export interface CliEnd {
  exitCode: number | null;
  stdout: string;
  stderr: string;
}

export interface CliOptions {
  env?: Record<string, string>;
  input?: string;
  /** Called with all that it has said so far. */
  onOutput?: (stdout: string, stderr: string, child: ChildProcess) => void;
}

export interface Shell extends Disposable {
  /** A directory of its own; the contexts are in `config/config.json` below it. */
  directory: string;
  viper(args: string[], options?: CliOptions): Promise<CliEnd>;
}

const main = fileURLToPath(new URL('./main.ts', import.meta.url));

/** `program` instead of the CLI's own main file. */
export function fakeShell(env: Record<string, string> = {}, program = main): Shell {
  const directory = mkdtempSync(join(tmpdir(), 'viper-cli-'));
  return {
    directory,
    viper: (args, options = {}) =>
      run(program, args, {
        ...options,
        env: {
          PATH: process.env.PATH ?? '',
          HOME: directory,
          VIPER_CONFIG: join(directory, 'config', 'config.json'),
          ...env,
          ...options.env,
        },
      }),
    [Symbol.dispose]: () => rmSync(directory, { recursive: true, force: true }),
  };
}

function run(program: string, args: string[], { env, input, onOutput }: CliOptions): Promise<CliEnd> {
  const child = spawn(process.execPath, [program, ...args], { env: env ?? {}, timeout: 30_000 });
  let stdout = '';
  let stderr = '';
  child.stdout.setEncoding('utf8').on('data', (text: string) => {
    stdout += text;
    onOutput?.(stdout, stderr, child);
  });
  child.stderr.setEncoding('utf8').on('data', (text: string) => {
    stderr += text;
    onOutput?.(stdout, stderr, child);
  });
  child.stdin.on('error', () => {}).end(input ?? '');
  return new Promise((resolve, reject) => {
    child.once('error', reject).once('close', (exitCode) => resolve({ exitCode, stdout, stderr }));
  });
}
