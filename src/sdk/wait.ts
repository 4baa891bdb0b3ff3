/**
 * Waits for the end of an operation by long polls. A daemon that is away for a moment (a restart) does not end
 * the wait: operations live in its store.
 */
import { httpStatus } from '../model/errors.ts';
import { backOff, delay } from './delay.ts';
import { ViperError } from './errors.ts';
import type { CallOptions, Calls, Operation } from './types.ts';

export interface WaitOptions extends CallOptions {
  /** Called with each state that is seen, the last one too. */
  onProgress?: (operation: Operation) => void;
  /** Then the wait ends with `timeout`; the operation goes on. No bound if absent. */
  timeoutMs?: number;
}

/** One long poll: short while somebody looks at the progress. The contract allows a minute. */
const watchedPollMs = 500;
const quietPollMs = 30_000;
/** How long a daemon may stay away during the wait. */
const absenceMs = 30_000;

/**
 * The operation once it has succeeded. Rejects with the error of one that failed or was cancelled, and with
 * `timeout` when the time is over; `operationId` of the error names it.
 */
export async function wait(
  getOperation: Calls['getOperation'],
  operation: Operation | string,
  options: WaitOptions = {},
): Promise<Operation> {
  const { signal, onProgress, timeoutMs = Number.POSITIVE_INFINITY } = options;
  const id = typeof operation === 'string' ? operation : operation.id;
  const deadline = Date.now() + timeoutMs;
  const pauses = backOff(200, 3000);
  let seen = typeof operation === 'string' ? undefined : operation;
  let lastAnswer = Date.now();
  for (;;) {
    if (seen) onProgress?.(seen);
    if (seen && seen.state !== 'running') return outcome(seen);
    const leftMs = deadline - Date.now();
    if (leftMs <= 0) throw timedOut(id, timeoutMs, seen);
    const waitMs = Math.ceil(Math.min(leftMs, onProgress ? watchedPollMs : quietPollMs));
    try {
      const asked = Date.now();
      const before = seen;
      seen = await getOperation({
        params: { operation: id },
        query: { waitMs },
        ...(signal ? { signal } : {}),
      });
      lastAnswer = Date.now();
      // A daemon that does not hold its answer back must not be asked in a tight loop.
      if (before && seen.state === 'running' && lastAnswer - asked < waitMs / 2) {
        await delay(Math.min(pauses.nextMs(), leftMs), signal);
      } else {
        pauses.reset();
      }
    } catch (error) {
      const away = error instanceof ViperError && error.code === 'unreachable';
      if (!away || Date.now() - lastAnswer > absenceMs) throw error;
      await delay(pauses.nextMs(), signal);
    }
  }
}

/** The operation if it succeeded; else its error is thrown. */
function outcome(operation: Operation): Operation {
  if (operation.state === 'succeeded') return operation;
  const code = operation.error?.code ?? (operation.state === 'cancelled' ? 'cancelled' : 'internal');
  const message =
    operation.error?.message ?? `The operation ${operation.kind} (${operation.id}) ${operation.state}`;
  throw new ViperError(code, message, {
    details: operation.error?.details ?? {},
    status: httpStatus(code) ?? 0,
    operationId: operation.id,
  });
}

function timedOut(id: string, timeoutMs: number, seen: Operation | undefined): ViperError {
  return new ViperError(
    'timeout',
    `Operation ${id} has not ended within ${timeoutMs} ms; it goes on in the daemon`,
    {
      operationId: id,
      details: { waitedMs: timeoutMs, ...(seen ? { state: seen.state, progress: seen.progress } : {}) },
    },
  );
}
