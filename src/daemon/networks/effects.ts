/** Does what a plan of `network/` says: on the host, and in the guest through its agent. */
import { setTimeout as sleep } from 'node:timers/promises';
import type { FastifyBaseLogger } from 'fastify';
import { AppError } from '../../model/errors.ts';
import type { Uuid } from '../../model/ids.ts';
import {
  type Action,
  type Command,
  type GuestStep,
  guestRequest,
  parseJoined,
  type Run,
  requireDone,
} from '../../network/index.ts';
import type { Machine } from '../../vm/machine.ts';

const agentAnswersMs = 10_000;
const undoTimeoutMs = 60_000;
const turnTimeoutMs = 3_000;
/** An agent that has just been moved may take a while to hear us again. */
const tries = 5;
const tryAgainMs = 1_000;

/** All or an error; what was done of it stays. */
export async function perform(
  action: Action,
  { run, machine, signal }: { run: Run; machine: Machine | undefined; signal: AbortSignal },
): Promise<void> {
  if (action.kind === 'guest') return inGuest(machine, action.step, signal);
  for (const [program, ...args] of action.commands) await run(program, args, { signal });
}

/** As much of it as can be done, in the face of what is there no more; gives what went wrong. */
export async function performAnyway(
  action: Action,
  { run, machine }: { run: Run; machine: Machine | undefined },
): Promise<Error[]> {
  const signal = AbortSignal.timeout(undoTimeoutMs);
  const failures: Error[] = [];
  const attempt = async (work: () => Promise<unknown>) => {
    await work().catch((error: Error) => failures.push(error));
  };
  if (action.kind === 'guest') await attempt(() => inGuestAtLast(machine, action.step, signal));
  else
    for (const [program, ...args] of action.commands)
      if (!removesWhatIsGone(await present(run, signal), [program, ...args]))
        await attempt(() => run(program, args, { signal }));
  return failures;
}

export const notTurned = 'the frames of a VM that stands still are not turned';

/** At once: the VM stands still. A failure is told. */
export async function turnFrames(
  { run, log }: { run: Run; log: FastifyBaseLogger },
  migrationId: Uuid,
  actions: readonly Action[],
): Promise<void> {
  const signal = AbortSignal.timeout(turnTimeoutMs);
  try {
    for (const action of actions) await perform(action, { run, machine: undefined, signal });
  } catch (error) {
    log.warn({ err: error, migrationId }, notTurned);
  }
}

/** Errors: `agent_unavailable`, `qemu_failed`; `timeout` when not all peers have joined. */
async function inGuest(machine: Machine | undefined, step: GuestStep, signal: AbortSignal): Promise<void> {
  if (!machine) throw new AppError('agent_unavailable', 'The VM does not run, so its guest cannot be asked');
  await machine.agent.ping({ timeoutMs: agentAnswersMs, signal });
  const reply = await machine.agent.exec({ ...guestRequest(step), signal });
  if (step.name !== 'join') return requireDone(step.name, reply);
  const { connections, joined, dropped } = parseJoined(reply);
  if (dropped) return;
  const message = `${joined} of ${connections} connections of the guest have joined its next address`;
  throw new AppError('timeout', message, { waitedFor: 'MPTCP', timeoutMs: step.waitMs, connections, joined });
}

async function inGuestAtLast(
  machine: Machine | undefined,
  step: GuestStep,
  signal: AbortSignal,
): Promise<void> {
  for (let left = tries; ; left -= 1) {
    try {
      return await inGuest(machine, step, signal);
    } catch (error) {
      if (left <= 1 || (error instanceof AppError && error.code !== 'agent_unavailable')) throw error;
      // A request that was under way when the VM moved is lost, and with it the place in the agent's stream.
      machine?.agent.close();
      await sleep(tryAgainMs, undefined, { signal });
    }
  }
}

/** Names of the devices of the host. */
async function present(run: Run, signal: AbortSignal): Promise<Set<string>> {
  const { stdout } = await run('ip', ['-j', 'link', 'show'], { signal });
  const links = JSON.parse(stdout.trim() || '[]') as { ifname?: unknown }[];
  return new Set(links.map(({ ifname }) => String(ifname)));
}

/** A command that names a device which is gone has nothing to do any more. */
function removesWhatIsGone(devices: ReadonlySet<string>, command: Command): boolean {
  const at = command.indexOf('dev');
  return at >= 0 && !devices.has(command[at + 1] ?? '');
}
