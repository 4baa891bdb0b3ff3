/**
 * What this folder plans and how it gets done: plans are argv lists, made without I/O; whoever owns the daemon gives
 * the function that runs one. So the same plan works on the host, inside a network namespace, and in a test.
 */
import { AppError } from '../model/errors.ts';

export type Command = readonly [program: string, ...args: string[]];

/** Runs one program; rejects when it fails. An `AppError` passes through as it is. */
export type Run = (
  program: string,
  args: readonly string[],
  options: { signal: AbortSignal },
) => Promise<{ stdout: string }>;

/** How to make one network device and how to take it away again, whatever part of it was made. */
export interface DevicePlan {
  name: string;
  up: Command[];
  down: Command[];
}

/**
 * Makes the device of the plan, or nothing: a failure half-way takes away what was made. Throws `unsupported` with
 * what the host said.
 */
export async function bringUp(plan: DevicePlan, run: Run, signal: AbortSignal): Promise<void> {
  let done = 0;
  try {
    for (const [program, ...args] of plan.up) {
      await run(program, args, { signal });
      done += 1;
    }
  } catch (error) {
    // If already the first command fails, a device of that name is not ours to take away.
    if (done > 0) await takeDown(plan, run).catch(() => {});
    throw explain(error, `Make network device ${plan.name}`);
  }
}

/** Takes the device away. Not cancellable: a device that stays would be in the way of the next start. */
export async function takeDown(plan: DevicePlan, run: Run): Promise<void> {
  const { signal } = new AbortController();
  try {
    for (const [program, ...args] of plan.down) await run(program, args, { signal });
  } catch (error) {
    throw explain(error, `Remove network device ${plan.name}`);
  }
}

function explain(error: unknown, action: string): AppError {
  if (error instanceof AppError) return error;
  const said = error instanceof Error ? error.message : String(error);
  return new AppError('unsupported', `${action}: ${said}`, { missing: 'network device' }, { cause: error });
}
