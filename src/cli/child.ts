/** Runs a program as a child of this one, as if it had been started in its place. */
import { spawn } from 'node:child_process';
import { constants } from 'node:os';

export interface ChildEnd {
  /** As a shell has it: 128 and the number of the signal that ended it. */
  exitCode: number;
  /** Empty if it was inherited. */
  stdout: string;
}

const maxOutputBytes = 1024 * 1024;

/**
 * A program of Viper: `file` is its source. `environment` comes on top of the own one; secrets go there, as arguments
 * are seen by every user.
 */
export const runChild = (
  file: string,
  args: string[],
  stdout: 'inherit' | 'pipe',
  environment: Record<string, string> = {},
): Promise<ChildEnd> =>
  runInPlace([process.execPath, ...process.execArgv, file, ...args], stdout, environment);

/** Any program; `environment` as above. */
export async function runInPlace(
  [program, ...args]: readonly [program: string, ...args: string[]],
  stdout: 'inherit' | 'pipe' = 'inherit',
  environment: Record<string, string> = {},
): Promise<ChildEnd> {
  const child = spawn(program, args, {
    stdio: ['inherit', stdout, 'inherit'],
    env: { ...process.env, ...environment },
  });
  const passOn = (signal: NodeJS.Signals) => void child.kill(signal);
  // A terminal sends Ctrl-C to the child as well: passing it on would make two of one.
  const onTerminal = [process.stdin, process.stdout, process.stderr].some((stream) => stream.isTTY);
  const onInterrupt = (signal: NodeJS.Signals) => {
    if (!onTerminal) passOn(signal);
  };
  process.on('SIGTERM', passOn).on('SIGHUP', passOn).on('SIGINT', onInterrupt);
  let output = '';
  child.stdout?.setEncoding('utf8').on('data', (text: string) => {
    output += text;
    if (output.length > maxOutputBytes) child.kill();
  });
  try {
    const [code, signal] = await new Promise<[number | null, NodeJS.Signals | null]>((resolve, reject) => {
      child.once('error', reject).once('close', (...end) => resolve(end));
    });
    return { exitCode: code ?? 128 + constants.signals[signal ?? 'SIGKILL'], stdout: output };
  } finally {
    process.removeListener('SIGTERM', passOn);
    process.removeListener('SIGHUP', passOn);
    process.removeListener('SIGINT', onInterrupt);
  }
}
