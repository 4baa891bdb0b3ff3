/**
 * The server's end of the link, on the TLS port of the HTTP API: connections whose ALPN name is one of ours never
 * reach HTTP, all others never reach us.
 */
import type { Server, TLSSocket } from 'node:tls';
import { AppError } from '../model/errors.ts';
import { type Identify, identifyPeer } from './identify.ts';
import { type LinkLimits, resolveLimits } from './limits.ts';
import { isLinkPurpose, type LinkPurpose } from './purposes.ts';
import { Reception } from './reception.ts';
import type { Session } from './session.ts';
import { type AcceptSession, SessionTable } from './session-table.ts';

export interface AttachLinkOptions {
  identify: Identify;
  /**
   * Judges a new session, for example by its ticket; once, however often its client connects meanwhile. To refuse
   * it throws an AppError, whose code and message the client gets; any other error is told as `internal`.
   */
  accept: AcceptSession;
  limits?: Partial<LinkLimits>;
  /** Sessions at one time: of all peers (256), and of one (64). */
  maxSessions?: number;
  maxSessionsPerPeer?: number;
  /** Connections of ours that no session has yet (64); more are closed. */
  maxReceptions?: number;
}

export interface Link extends AsyncDisposable {
  /** The sessions of this end that are not gone. */
  readonly sessions: readonly Session[];
  /** Connections that no session has yet, or that were refused and have not hung up. */
  readonly receptionCount: number;
  /** Gives the whole port back to HTTP and ends all sessions; their peers hear `interrupted`. */
  close(): Promise<void>;
}

/**
 * Takes the connections of the link over from a TLS or HTTPS server. The server must have been made with
 * `ALPNProtocols: serverAlpnProtocols`, `requestCert: true`, `rejectUnauthorized: false` and the fleet's CA alone.
 * Listeners for 'secureConnection' that are added later would see our connections too. Close the link before the
 * server, which waits for our connections as for any others.
 * Errors: `invalid_request` for limits that make no sense.
 */
export function attachLink(server: Server, options: AttachLinkOptions): Link {
  const limits = resolveLimits(options.limits);
  const { accept, maxSessions = 256, maxSessionsPerPeer = 64, maxReceptions = 64 } = options;
  const table = new SessionTable({ accept, limits, maxSessions, maxSessionsPerPeer });
  const receptions = new Set<Reception>();

  const others = server.listeners('secureConnection') as ((socket: TLSSocket) => void)[];
  const onConnection = (socket: TLSSocket): void => {
    const purpose = socket.alpnProtocol;
    if (isLinkPurpose(purpose)) receive(socket, purpose);
    else for (const listener of others) listener.call(server, socket);
  };
  server.removeAllListeners('secureConnection');
  server.on('secureConnection', onConnection);

  function receive(socket: TLSSocket, purpose: LinkPurpose): void {
    socket.on('error', () => {});
    if (receptions.size >= maxReceptions) {
      socket.destroy();
      return;
    }
    const peer = identifyPeer(socket, options.identify);
    const reception = new Reception(socket, limits, {
      onHello(hello) {
        if ('cloudletId' in peer) table.admit(reception, { purpose, cloudletId: peer.cloudletId }, hello);
      },
      onEnd: () => receptions.delete(reception),
    });
    receptions.add(reception);
    if ('refused' in peer) {
      const message = `The connection is not taken: ${peer.refused}`;
      reception.refuse('untrusted', { code: 'unauthenticated', message });
    }
  }

  const close = async (): Promise<void> => {
    if (!server.listeners('secureConnection').includes(onConnection)) return;
    server.off('secureConnection', onConnection);
    for (const listener of others) server.on('secureConnection', listener);
    for (const reception of receptions) reception.close();
    await table.close(new AppError('interrupted', 'The daemon of this cloudlet stops'));
  };

  return {
    get sessions() {
      return table.sessions;
    },
    get receptionCount() {
      return receptions.size;
    },
    close,
    [Symbol.asyncDispose]: close,
  };
}
