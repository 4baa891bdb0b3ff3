/** One run of the program: parse, act, tell what went wrong, and leave the exit code in `process.exitCode`. */
import { addCompletionCommands, addNames } from './completion.ts';
import { describeError, exitCodeOf } from './failures.ts';
import { createProgram } from './program.ts';

export async function run(argv: string[], daemonProgram: string): Promise<void> {
  // A reader that has seen enough (`viper vm list | head -1`) is no failure.
  process.stdout.on('error', (error: NodeJS.ErrnoException) => {
    if (error.code !== 'EPIPE') throw error;
    process.exit();
  });
  try {
    const program = createProgram(daemonProgram);
    const completion = addCompletionCommands(program);
    if (argv[0] === 'complete' && argv[1] === '--') await addNames(completion, argv.slice(2));
    await program.parseAsync(argv, { from: 'user' });
  } catch (error) {
    for (const line of describeError(error)) process.stderr.write(`${line}\n`);
    process.exitCode = exitCodeOf(error);
  }
}
