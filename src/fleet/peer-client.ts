/**
 * The one way to call another cloudlet. TLS 1.3 with both certificates; the peer is who its certificate says, signed by
 * the fleet's CA, whatever the address. OpenSSL checks the chain and its validity in time, `checkServerIdentity` the
 * cloudlet; both before the first byte of a request leaves.
 */
import { X509Certificate } from 'node:crypto';
import { once } from 'node:events';
import type { IncomingMessage } from 'node:http';
import { Agent, request } from 'node:https';
import type { Socket } from 'node:net';
import { AppError, type ErrorCode, errorKinds } from '../model/errors.ts';
import type { Uuid } from '../model/ids.ts';
import { type CertifiedCloudlet, parseCertificate, readMember } from './certificates.ts';
import { certificateFingerprint } from './fingerprint.ts';

export interface PeerRequest {
  method?: 'GET' | 'POST' | 'PUT' | 'DELETE';
  /** Sent as JSON. */
  json?: unknown;
  signal?: AbortSignal | undefined;
  /** For the whole exchange. */
  timeoutMs?: number;
  /** The largest answer that is read. */
  maxBytes?: number;
}

/** What the peer's certificate said when it was last called. */
export interface SeenPeer {
  name: string;
  certificateFingerprint: string;
}

interface ClientIdentity {
  caCertificate: string;
  tls: { key: string; cert: string; ca: string };
}

const CONNECT_TIMEOUT_MS = 5000;
const IDLE_TIMEOUT_MS = 30_000;
const DEFAULT_TIMEOUT_MS = 10_000;
const DEFAULT_MAX_BYTES = 1024 * 1024;

export class PeerClient implements Disposable {
  #identity: ClientIdentity;
  readonly #agents = new Map<Uuid, Agent>();
  readonly #seen = new Map<Uuid, SeenPeer>();

  constructor(identity: ClientIdentity) {
    this.#identity = identity;
  }

  /**
   * Asks a peer and gives its JSON answer, `undefined` if it has no body.
   * Errors: `peer_unreachable`, `peer_untrusted`, `timeout`, and whatever error the peer answers with.
   */
  async fetch(peer: { id: Uuid; url: string }, path: string, init: PeerRequest = {}): Promise<unknown> {
    return exchange(peer.url, path, init, this.#agentFor(peer.id));
  }

  /** What the certificate of the peer said at the newest connection to it. */
  seen(id: Uuid): SeenPeer | undefined {
    return this.#seen.get(id);
  }

  /**
   * Shows another certificate from now on, such as a renewed one. Calls under way end on the old connections, which
   * close by themselves when they have been idle.
   */
  useIdentity(identity: ClientIdentity): void {
    this.#identity = identity;
    this.#agents.clear();
  }

  /** Closes the connections to a peer, such as one that was removed. */
  forget(id: Uuid): void {
    this.#agents.get(id)?.destroy();
    this.#agents.delete(id);
    this.#seen.delete(id);
  }

  close(): void {
    for (const agent of this.#agents.values()) agent.destroy();
    this.#agents.clear();
  }

  [Symbol.dispose](): void {
    this.close();
  }

  #agentFor(id: Uuid): Agent {
    const known = this.#agents.get(id);
    if (known) return known;
    const agent = createAgent(this.#identity.tls, (member, certificate) => {
      if (member.cloudletId !== id) return `it is cloudlet ${member.cloudletId} (${member.name}), not ${id}`;
      const { name } = member;
      this.#seen.set(id, { name, certificateFingerprint: certificateFingerprint(certificate) });
      return undefined;
    });
    this.#agents.set(id, agent);
    return agent;
  }
}

/**
 * Connections on which only a member of the fleet is spoken with whom `refuse` has no objection to. A caller without
 * `key` and `cert` stays anonymous.
 */
export function createAgent(
  tls: { key?: string; cert?: string; ca: string },
  refuse: (member: CertifiedCloudlet, certificate: X509Certificate) => string | undefined,
): Agent {
  const ca = parseCertificate(tls.ca);
  return new Agent({
    ...tls,
    keepAlive: true,
    maxSockets: 4,
    timeout: IDLE_TIMEOUT_MS,
    minVersion: 'TLSv1.3',
    rejectUnauthorized: true,
    // A resumed session would skip the check of the identity.
    maxCachedSessions: 0,
    checkServerIdentity: (host, { raw }) => {
      const certificate = new X509Certificate(raw);
      const member = readMember(certificate, ca);
      const objection = member
        ? refuse(member, certificate)
        : 'its certificate is of no cloudlet of the fleet';
      return objection === undefined ? undefined : untrusted(host, objection);
    },
  });
}

/** One request and its whole answer; errors as for `PeerClient.fetch`. */
export async function exchange(url: string, path: string, init: PeerRequest, agent: Agent): Promise<unknown> {
  const { method = 'GET', json, signal, timeoutMs = DEFAULT_TIMEOUT_MS, maxBytes = DEFAULT_MAX_BYTES } = init;
  const deadline = AbortSignal.timeout(timeoutMs);
  try {
    const body = json === undefined ? undefined : JSON.stringify(json);
    const sent = request(`${url}${path}`, {
      agent,
      method,
      signal: signal ? AbortSignal.any([signal, deadline]) : deadline,
      headers:
        body === undefined
          ? {}
          : { 'content-type': 'application/json', 'content-length': Buffer.byteLength(body) },
    });
    sent.once('socket', boundConnecting);
    sent.end(body);
    const [answered] = (await once(sent, 'response')) as [IncomingMessage];
    const answer = parseJson(await readText(answered, maxBytes, url));
    const status = answered.statusCode!;
    if (status >= 200 && status < 300) return answer;
    throw peerError(url, status, answer);
  } catch (error) {
    signal?.throwIfAborted();
    throw asPeerError(error, url, deadline.aborted ? timeoutMs : undefined);
  }
}

/** Ends a connection that is not secure in time. */
function boundConnecting(socket: Socket): void {
  if (!socket.connecting) return;
  const error = new Error(`no connection within ${CONNECT_TIMEOUT_MS} ms`);
  const timer = setTimeout(() => socket.destroy(error), CONNECT_TIMEOUT_MS);
  for (const event of ['secureConnect', 'close']) socket.once(event, () => clearTimeout(timer));
}

async function readText(body: IncomingMessage, maxBytes: number, url: string): Promise<string> {
  const chunks: Buffer[] = [];
  let size = 0;
  for await (const chunk of body as AsyncIterable<Buffer>) {
    size += chunk.length;
    if (size > maxBytes) {
      throw new AppError('peer_unreachable', `${url} answered with more than ${maxBytes} bytes.`, {
        url,
        maxBytes,
      });
    }
    chunks.push(chunk);
  }
  return Buffer.concat(chunks).toString();
}

function parseJson(text: string): unknown {
  try {
    return text === '' ? undefined : JSON.parse(text);
  } catch {
    return undefined;
  }
}

/** The error that a peer answered with, if it is one of ours. */
function peerError(url: string, status: number, answer: unknown): AppError {
  const { code, message, details } = (answer as { error?: Record<string, unknown> } | undefined)?.error ?? {};
  if (typeof code !== 'string' || !Object.hasOwn(errorKinds, code) || typeof message !== 'string') {
    return new AppError('peer_unreachable', `${url} answered ${status} and no error that Viper knows.`, {
      url,
      status,
    });
  }
  const known = typeof details === 'object' && details !== null ? (details as Record<string, unknown>) : {};
  return new AppError(code as ErrorCode, message.slice(0, 1000), { ...known, answeredBy: url });
}

/** What OpenSSL and node call a certificate that they do not accept. */
const untrustedCodes =
  /^(CERT_|DEPTH_ZERO_|SELF_SIGNED_|UNABLE_TO_|INVALID_CA|INVALID_PURPOSE|PATH_LENGTH|ERR_TLS_CERT_)/;

/** A failure of the connection as `peer_untrusted`, `timeout` or `peer_unreachable`; an AppError as it is. */
export function asPeerError(error: unknown, url: string, timedOutAfterMs?: number): AppError {
  for (let at = error; at instanceof Error; at = at.cause) if (at instanceof AppError) return at;
  if (timedOutAfterMs !== undefined) {
    const details = { url, waitedMs: timedOutAfterMs };
    return new AppError('timeout', `${url} did not answer in ${timedOutAfterMs} ms.`, details, {
      cause: error,
    });
  }
  const { code = '', message = '' } = error as { code?: string; message?: string };
  if (untrustedCodes.test(code)) return untrusted(url, message, error);
  // An AggregateError of several addresses has a code and no message.
  return new AppError(
    'peer_unreachable',
    `Cannot reach ${url}: ${message || code}.`,
    { url },
    { cause: error },
  );
}

export const untrusted = (where: string, why: string, cause?: unknown): AppError =>
  new AppError('peer_untrusted', `${where} is not trusted: ${why}.`, { where, why }, { cause });
