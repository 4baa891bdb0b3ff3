/**
 * How a session fails, as the errors that its user sees. `details.reason` tells the cases of one code apart: what
 * to do about them is the same.
 */
import { AppError, type ErrorCode, errorCodes } from '../model/errors.ts';
import type { RefuseReason } from './frames.ts';

/** The bytes or frames of the peer break the protocol. */
export const protocolError = (what: string): AppError =>
  new AppError('peer_unreachable', `The peer broke the protocol of the link: ${what}`, {
    reason: 'protocol',
    what,
  });

export const gaveUp = (giveUpMs: number, cause: unknown): AppError =>
  new AppError(
    'peer_unreachable',
    `The peer could not be reached for ${giveUpMs} ms`,
    { reason: 'gave_up', giveUpMs },
    { cause },
  );

export const untrusted = (what: string, cause?: unknown): AppError =>
  new AppError(
    'peer_untrusted',
    `The peer is not who it should be: ${what}`,
    { reason: 'untrusted', what },
    { cause },
  );

/** The peer ended the session by RESET. */
export const resetByPeer = (code: string, message: string): AppError =>
  new AppError(knownCode(code), `The peer ended the session: ${message}`, {
    reason: 'reset',
    peerCode: code,
  });

/** The peer does not let us open or resume. */
export function refusedByPeer(reason: RefuseReason, code: string, message: string): AppError {
  const details = { reason, peerCode: code };
  if (reason === 'unknown_session') {
    return new AppError(
      'interrupted',
      'The peer does not know the session any more: was its daemon restarted?',
      details,
    );
  }
  return new AppError(knownCode(code), `The peer refused the session: ${message}`, details);
}

/** What the peer may know of an error: nothing of bugs. */
export const publicReason = (error: unknown): { code: string; message: string } =>
  error instanceof AppError
    ? { code: error.code, message: error.message }
    : { code: 'internal', message: 'An unexpected failure; the log of that cloudlet has more' };

const knownCode = (code: string): ErrorCode => errorCodes.find((each) => each === code) ?? 'internal';
