/** What an aborted signal means to the caller of a long action. */
import { AppError } from '../model/errors.ts';

/** The reason itself if whoever aborted gave a proper one (such as `interrupted`), else `cancelled`. */
export function cancellation(reason: unknown, action: string): AppError {
  if (reason instanceof AppError) return reason;
  return new AppError('cancelled', `${action}: cancelled`, {}, { cause: reason });
}

export function throwIfCancelled(signal: AbortSignal, action: string): void {
  if (signal.aborted) throw cancellation(signal.reason, action);
}
