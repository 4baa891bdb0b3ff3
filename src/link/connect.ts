/** One attempt to carry a session: TCP, TLS, who is there, HELLO, and the answer to it. */
import { connect as connectTls, type TLSSocket } from 'node:tls';
import { AppError } from '../model/errors.ts';
import { Carrier, type CarrierOwner } from './carrier.ts';
import type { EarlyConnection } from './early-connection.ts';
import { protocolError, refusedByPeer, untrusted } from './errors.ts';
import { encodeFrame } from './frame-encoder.ts';
import type { Frame, HelloFrame } from './frames.ts';
import { type Identify, identifyPeer } from './identify.ts';
import type { LinkLimits } from './limits.ts';
import type { LinkPurpose } from './purposes.ts';

/** PEM. `ca` is the fleet's CA and nothing else. */
export interface LinkCredentials {
  key: string;
  cert: string;
  ca: string;
}

export interface Target {
  /** `https://host:port` of the daemon. */
  url: string;
  purpose: LinkPurpose;
  credentials: LinkCredentials;
  identify: Identify;
  expectCloudletId: string;
}

/**
 * A failure that another attempt would meet again. `authenticated` if it is the word of the right peer; otherwise
 * somebody else may have answered in its place.
 */
export class FinalFailure {
  readonly error: AppError;
  readonly authenticated: boolean;

  constructor(error: AppError, authenticated: boolean) {
    this.error = error;
    this.authenticated = authenticated;
  }
}

type Welcome = Extract<Frame, { type: 'welcome' }>;

/** FORMAT.md has the numbers; TLS 1.3 obliges every implementation to have it. */
const fastestCipher = 'TLS_AES_128_GCM_SHA256';

/**
 * Connects and says HELLO. `onWelcome` gets the connection at once when the peer has answered, since frames of the
 * session may follow in the same packet. Rejects with a FinalFailure, with an AppError that is worth another
 * attempt, or with the reason of the signal.
 */
export async function connect(
  target: Target,
  hello: HelloFrame,
  limits: LinkLimits,
  signal: AbortSignal,
  onWelcome: (carrier: Carrier, welcome: Welcome) => void,
  early?: EarlyConnection,
): Promise<void> {
  const timeout = AbortSignal.timeout(limits.connectTimeoutMs);
  const stop = AbortSignal.any([signal, timeout]);
  const ready = await early?.take();
  const socket = await (ready ??
    connectSocket(target, stop).catch((error) => {
      if (timeout.aborted && !signal.aborted)
        throw unreachable(target, `no connection in ${limits.connectTimeoutMs} ms`);
      throw error;
    }));
  const answered = Promise.withResolvers<void>();
  let helloDue = true;
  const owner: CarrierOwner = {
    onFrame(frame) {
      if (frame.type === 'welcome') {
        onWelcome(carrier, frame);
        answered.resolve();
      } else {
        carrier.destroy();
        answered.reject(
          frame.type === 'refuse'
            ? new FinalFailure(refusedByPeer(frame.reason, frame.code, frame.message), true)
            : new FinalFailure(protocolError(`it answers HELLO by ${frame.type}`), true),
        );
      }
    },
    nextOutput() {
      const output = helloDue ? [encodeFrame(hello)] : undefined;
      helloDue = false;
      return output;
    },
    onTick() {},
    onLost(reason) {
      answered.reject(reason.details.reason === 'protocol' ? new FinalFailure(reason, true) : reason);
    },
  };
  const carrier = new Carrier(socket, limits, owner);
  const onStop = () => {
    carrier.destroy();
    answered.reject(signal.aborted ? signal.reason : unreachable(target, 'no answer to HELLO'));
  };
  stop.addEventListener('abort', onStop, { once: true });
  if (stop.aborted) onStop();
  carrier.kick();
  try {
    await answered.promise;
  } finally {
    stop.removeEventListener('abort', onStop);
  }
}

/** A TLS connection to the right cloudlet for the right purpose. */
export function connectSocket(target: Target, signal: AbortSignal): Promise<TLSSocket> {
  const { purpose, credentials, expectCloudletId } = target;
  const url = new URL(target.url);
  const { promise, resolve, reject } = Promise.withResolvers<TLSSocket>();
  const socket = connectTls({
    host: url.hostname.replace(/^\[(.*)\]$/, '$1'),
    port: Number(url.port || 443),
    ...credentials,
    ALPNProtocols: [purpose],
    minVersion: 'TLSv1.3',
    ciphers: fastestCipher,
    rejectUnauthorized: true,
    // Who it is follows from the certificate's cloudlet, never from the address it was found at.
    checkServerIdentity: () => undefined,
  });
  const settle = (failure: unknown) => {
    signal.removeEventListener('abort', onAbort);
    socket.off('secureConnect', onSecure);
    socket.off('error', onError);
    socket.off('close', onClose);
    if (failure === undefined) return resolve(socket);
    socket.destroy();
    reject(failure);
  };
  const onAbort = () => settle(signal.reason);
  const onClose = () => settle(unreachable(target, 'it closed the connection'));
  const onError = (error: NodeJS.ErrnoException) => {
    // TLS has judged the certificate before it fails the connection for it.
    const judged = socket.authorizationError as unknown;
    if (judged) return settle(new FinalFailure(untrusted(`${target.url}: ${error.message}`, error), false));
    if (error.code === 'ERR_SSL_TLSV1_ALERT_NO_APPLICATION_PROTOCOL')
      return settle(noSuchPurpose(target, error));
    settle(unreachable(target, error.message, error));
  };
  const onSecure = () => {
    const peer = identifyPeer(socket, target.identify);
    if ('refused' in peer)
      return settle(new FinalFailure(untrusted(`${target.url}: ${peer.refused}`), false));
    if (peer.cloudletId !== expectCloudletId) {
      const what = `${target.url} is cloudlet ${peer.cloudletId}, and ${expectCloudletId} was wanted`;
      return settle(new FinalFailure(untrusted(what), false));
    }
    if (socket.alpnProtocol !== purpose) return settle(noSuchPurpose(target));
    settle(undefined);
  };
  socket.once('secureConnect', onSecure);
  socket.once('error', onError);
  // Errors after the first say nothing new, and must not be unhandled.
  socket.on('error', () => {});
  socket.once('close', onClose);
  signal.addEventListener('abort', onAbort, { once: true });
  if (signal.aborted) onAbort();
  return promise;
}

const unreachable = ({ url }: Target, why: string, cause?: unknown): AppError =>
  new AppError(
    'peer_unreachable',
    `Cannot connect to the cloudlet at ${url}: ${why}`,
    { url, reason: 'connect' },
    { cause },
  );

const noSuchPurpose = ({ url, purpose }: Target, cause?: unknown): FinalFailure =>
  new FinalFailure(
    new AppError(
      'peer_unreachable',
      `The server at ${url} does not speak ${purpose}`,
      { url, reason: 'no_such_purpose', purpose },
      { cause },
    ),
    false,
  );
