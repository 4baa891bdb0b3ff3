/** The client's end: opens a session and connects again whenever its connection is lost. */
import { randomBytes } from 'node:crypto';
import { AppError, asAppError } from '../model/errors.ts';
import type { Carrier } from './carrier.ts';
import { connect, FinalFailure, type LinkCredentials, type Target } from './connect.ts';
import { EarlyConnection } from './early-connection.ts';
import { gaveUp } from './errors.ts';
import { type HelloFrame, maxMetadataBytes, secretBytes, sessionIdBytes } from './frames.ts';
import type { Identify } from './identify.ts';
import type { JsonObject } from './json.ts';
import { type LinkLimits, resolveLimits } from './limits.ts';
import { LinkSession } from './link-session.ts';
import type { LinkPurpose } from './purposes.ts';
import type { SharedLimits } from './sender.ts';
import type { Session } from './session.ts';

export interface OpenSessionOptions {
  /** `https://host:port` of the peer's daemon. */
  url: string;
  /** A function is asked for each connection, so that a renewed certificate is used. */
  tls: LinkCredentials | (() => LinkCredentials);
  /** The cloudlet that the peer's certificate must name. */
  expectCloudletId: string;
  identify: Identify;
  purpose: LinkPurpose;
  /** What the session is about: a ticket, a migration, a channel. JSON of at most 8 KiB. */
  hello: JsonObject;
  /** Beside the session's own limit. */
  sharedLimits?: SharedLimits;
  /** An abort ends the session, also after it has been opened. */
  signal?: AbortSignal;
  limits?: Partial<LinkLimits>;
  /** A connection for the same peer and purpose that was begun before; it is used if it is still good. */
  early?: EarlyConnection | undefined;
}

/**
 * Opens a session with a peer. Resolves when the peer has accepted it.
 *
 * Errors, here or later on the stream: `peer_untrusted` if somebody else answers at the URL; `peer_unreachable` if
 * nobody does for `openTimeoutMs`, or later for `giveUpMs`; `interrupted` if the peer has forgotten the session;
 * the peer's own code if it refuses or resets; `invalid_request` for options that make no sense; the reason of
 * the signal if that is an AppError, else `cancelled`.
 *
 * Once a session is open, a stranger at the peer's address does not end it: it counts as a cut.
 */
export async function openSession(options: OpenSessionOptions): Promise<Session> {
  const limits = resolveLimits(options.limits);
  const target = targetOf(options);
  if (Buffer.byteLength(JSON.stringify(options.hello)) > maxMetadataBytes) {
    throw new AppError(
      'invalid_request',
      `The hello of a session has more than ${maxMetadataBytes} bytes of JSON`,
      {
        problems: [{ field: 'hello', wanted: `at most ${maxMetadataBytes} bytes` }],
      },
    );
  }
  if (options.signal?.aborted) throw abortReason(options.signal);
  const id = randomBytes(sessionIdBytes).toString('hex');
  const { purpose, expectCloudletId: cloudletId, hello } = options;
  const session = new LinkSession(
    { id, purpose, cloudletId, hello },
    { side: 'client', limits, sharedLimits: options.sharedLimits },
  );
  const opened = Promise.withResolvers<void>();
  // Until it is open nobody but us listens to it.
  session.once('error', opened.reject);
  const onAbort = () => session.destroy(abortReason(options.signal!));
  options.signal?.addEventListener('abort', onAbort, { once: true });
  session.gone.then(() => options.signal?.removeEventListener('abort', onAbort));
  void keepConnected(session, target, limits, opened.resolve, options.early);
  try {
    await opened.promise;
  } catch (error) {
    await session.abandon();
    throw error;
  }
  session.off('error', opened.reject);
  return session;
}

/** Begins to connect for a session that will be opened soon, see `EarlyConnection`. */
export function connectEarly(
  options: Pick<OpenSessionOptions, 'url' | 'tls' | 'expectCloudletId' | 'identify' | 'purpose' | 'limits'>,
): EarlyConnection {
  return new EarlyConnection(targetOf(options)(), resolveLimits(options.limits));
}

/** Connects, waits until the connection is lost, rests, and connects again, as long as the session wants one. */
async function keepConnected(
  session: LinkSession,
  target: () => Target,
  limits: LinkLimits,
  onOpen: () => void,
  early?: EarlyConnection,
): Promise<void> {
  const secret = randomBytes(secretBytes);
  const stop = new AbortController();
  session.gone.then(() => stop.abort(gone));
  const openUntilMs = performance.now() + limits.openTimeoutMs;
  let restMs = limits.firstBackOffMs;
  let attempt = 0;
  let isOpen = false;
  while (session.wantsConnection) {
    attempt += 1;
    const hello: HelloFrame = {
      type: 'hello',
      kind: isOpen ? 'resume' : 'open',
      attempt,
      sessionId: session.id,
      secret,
      ...session.position,
      metadata: isOpen ? {} : session.hello,
    };
    const lost = Promise.withResolvers<void>();
    session.once('disconnected', lost.resolve);
    try {
      const onWelcome = (carrier: Carrier, welcome: { received: number; limit: number }) => {
        if (!session.wantsConnection) return carrier.destroy();
        isOpen = true;
        restMs = limits.firstBackOffMs;
        onOpen();
        session.attach(carrier, welcome);
      };
      await connect(target(), hello, limits, stop.signal, onWelcome, attempt === 1 ? early : undefined);
      await Promise.race([lost.promise, session.gone]);
    } catch (failure) {
      if (stop.signal.aborted) return;
      if (failure instanceof FinalFailure && (failure.authenticated || !isOpen))
        return session.fail(failure.error);
      const error = failure instanceof FinalFailure ? failure.error : failure;
      // A bug, or credentials that cannot be read: neither mends itself.
      if (!(error instanceof AppError)) return session.fail(asAppError(error));
      if (!isOpen && performance.now() > openUntilMs)
        return session.fail(gaveUp(limits.openTimeoutMs, error));
    } finally {
      session.off('disconnected', lost.resolve);
    }
    // Jitter, so that all sessions of a broken path do not come back in one moment.
    await rest(restMs * (0.5 + Math.random() / 2), stop.signal);
    restMs = Math.min(2 * restMs, limits.mostBackOffMs);
  }
}

const gone = new AppError('cancelled', 'The session is gone');

function rest(ms: number, signal: AbortSignal): Promise<void> {
  const { promise, resolve } = Promise.withResolvers<void>();
  const onAbort = () => resolve();
  const timer = setTimeout(resolve, ms);
  signal.addEventListener('abort', onAbort, { once: true });
  return promise.finally(() => {
    clearTimeout(timer);
    signal.removeEventListener('abort', onAbort);
  });
}

type Where = Pick<OpenSessionOptions, 'url' | 'tls' | 'expectCloudletId' | 'identify' | 'purpose'>;

function targetOf({ url, tls, expectCloudletId, identify, purpose }: Where): () => Target {
  if (!URL.canParse(url) || new URL(url).protocol !== 'https:') {
    throw new AppError('invalid_request', `Cannot open a session with ${url}: wanted https://host:port`, {
      problems: [{ field: 'url', value: url, wanted: 'https://host:port' }],
    });
  }
  const credentials = typeof tls === 'function' ? tls : () => tls;
  return () => ({ url, purpose, credentials: credentials(), identify, expectCloudletId });
}

const abortReason = (signal: AbortSignal): AppError =>
  signal.reason instanceof AppError
    ? signal.reason
    : new AppError('cancelled', 'The session was cancelled', {}, { cause: signal.reason });
