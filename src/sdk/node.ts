/**
 * The client for Node: TLS 1.3 pinned to the CA of the fleet, client certificates, and connections that are
 * kept for the next call. The only file of the SDK that needs Node.
 */
import { createHash, X509Certificate } from 'node:crypto';
import type { TLSSocket } from 'node:tls';
import { Agent, buildConnector, WebSocket as UndiciWebSocket, fetch as undiciFetch } from 'undici';
import { type ConnectOptions, connect, type Viper } from './client.ts';
import type { WebSocketClass } from './console.ts';

export * from './client.ts';

export interface NodeConnectOptions extends Pick<ConnectOptions, 'url' | 'token'> {
  /** PEM: then only this CA is trusted, and the certificate must be for the host in the URL as always. */
  ca?: string;
  /** PEM of certificate and key that speak for the caller instead of a token. */
  clientCertificate?: { certificate: string; key: string };
  /**
   * SHA-256 (hex) of the daemon's own certificate: only this one is talked to, before a byte is sent. Without
   * `ca` it stands for the whole check, as for a daemon whose CA is not known yet.
   */
  fingerprint?: string;
}

export interface NodeViper extends Viper, AsyncDisposable {
  /** Closes the kept connections once their calls have ended. */
  close(): Promise<void>;
}

/** Longer than any call that the contract lets a daemon hold back (a program in a guest: 600 s). */
const answerMs = 660_000;

export function connectNode(options: NodeConnectOptions): NodeViper {
  const { url, token, ca, clientCertificate, fingerprint } = options;
  const tls = {
    minVersion: 'TLSv1.3' as const,
    ...(ca ? { ca } : {}),
    ...(clientCertificate ? { cert: clientCertificate.certificate, key: clientCertificate.key } : {}),
  };
  const agent = new Agent({
    connect: fingerprint ? pinned(fingerprint, { ...tls, rejectUnauthorized: Boolean(ca) }) : tls,
    keepAliveTimeout: 20_000,
    headersTimeout: answerMs,
    bodyTimeout: answerMs,
  });
  class PinnedWebSocket extends UndiciWebSocket {
    constructor(address: string, protocols: string[]) {
      super(address, { protocols, dispatcher: agent });
    }
  }
  const viper = connect({
    url,
    ...(token ? { token } : {}),
    // undici's own types of the same standard differ from those of the browser in details.
    fetch: ((address: string, init: object) =>
      undiciFetch(address, { ...init, dispatcher: agent })) as unknown as typeof fetch,
    WebSocket: PinnedWebSocket as unknown as WebSocketClass,
  });
  const close = () => agent.close();
  return { ...viper, close, [Symbol.asyncDispose]: close };
}

/** A connector that gives a connection on only if its certificate is the pinned one. */
function pinned(fingerprint: string, tls: buildConnector.BuildOptions): buildConnector.connector {
  const wanted = fingerprint.replaceAll(':', '').toLowerCase();
  // A resumed session shows no certificate to compare.
  const connector = buildConnector({ ...tls, maxCachedSessions: 0 });
  return (target, callback) =>
    connector(target, (error, socket) => {
      if (error) return callback(error, null);
      const seen = (socket as TLSSocket).getPeerX509Certificate?.();
      if (seen && fingerprintOf(seen) === wanted) return callback(null, socket);
      socket.destroy();
      const mismatch = new Error(
        `The certificate has the fingerprint ${seen ? fingerprintOf(seen) : '(none)'}`,
      );
      callback(Object.assign(mismatch, { code: 'FINGERPRINT_MISMATCH' }), null);
    });
}

/** SHA-256 of a certificate (PEM or parsed), as tokens and peers name it. */
export function fingerprintOf(certificate: X509Certificate | string): string {
  const { raw } = typeof certificate === 'string' ? new X509Certificate(certificate) : certificate;
  return createHash('sha256').update(raw).digest('hex');
}
