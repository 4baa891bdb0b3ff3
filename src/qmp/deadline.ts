/**
 * A wait with an end: by its own result, by a timeout or by an AbortSignal, whichever comes first. The first
 * reason wins; whatever the work does later is ignored.
 */
import { AppError } from '../model/errors.ts';

export interface WaitOptions {
  timeoutMs?: number;
  signal?: AbortSignal;
}

/** Node clamps longer timers to 1 ms. */
const maxTimerMs = 2 ** 31 - 1;

/** Settles as `work` does, or rejects with `onTimeout()` or with the abort's reason. */
export async function withDeadline<T>(
  work: Promise<T>,
  options: WaitOptions & { onTimeout: () => Error },
): Promise<T> {
  const { signal, timeoutMs, onTimeout } = options;
  const early = Promise.withResolvers<never>();
  const onAbort = () => early.reject(abortError(signal!));
  // Nobody may be listening any more when the work fails after the deadline.
  work.catch(() => {});
  if (signal?.aborted) throw abortError(signal);
  signal?.addEventListener('abort', onAbort, { once: true });
  const timer =
    timeoutMs !== undefined && timeoutMs <= maxTimerMs
      ? setTimeout(() => early.reject(onTimeout()), timeoutMs)
      : undefined;
  try {
    return await Promise.race([work, early.promise]);
  } finally {
    clearTimeout(timer);
    signal?.removeEventListener('abort', onAbort);
  }
}

/** The reason of an abort as an error of ours: an AppError stays what it is, anything else is `cancelled`. */
export function abortError(signal: AbortSignal): AppError {
  if (signal.reason instanceof AppError) return signal.reason;
  return new AppError(
    'cancelled',
    'The work was cancelled before it had ended',
    {},
    { cause: signal.reason },
  );
}

/** Rests for a while; an abort ends the rest with its reason. */
export function delay(ms: number, signal?: AbortSignal): Promise<void> {
  const { promise, resolve } = Promise.withResolvers<void>();
  const timer = setTimeout(resolve, ms);
  return withDeadline(promise, { signal, onTimeout: () => new Error('unreachable') }).finally(() =>
    clearTimeout(timer),
  );
}
