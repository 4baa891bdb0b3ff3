/** Who is calling, and may they: one decision for HTTP requests and for the console's WebSocket. */
import type { X509Certificate } from 'node:crypto';
import type { TLSSocket } from 'node:tls';
import type { FastifyRequest } from 'fastify';
import type { Access } from '../../contract/routes.ts';
import { AppError } from '../../model/errors.ts';
import type { Cloudlet } from '../cloudlet.ts';
import type { Principal } from '../credentials.ts';

const callers = new WeakMap<FastifyRequest, Principal>();
/** A certificate is read once for each connection. */
const certificates = new WeakMap<object, X509Certificate | null>();

/** Who made the request; undefined on an open route. */
export const callerOf = (request: FastifyRequest): Principal | undefined => callers.get(request);

function peerCertificate(request: FastifyRequest): X509Certificate | undefined {
  const socket = request.raw.socket as TLSSocket;
  // Without TLS (a test's injected request, a user's own server behind a proxy) there is none.
  if (typeof socket.getPeerX509Certificate !== 'function') return undefined;
  let certificate = certificates.get(socket);
  if (certificate === undefined) {
    certificate = socket.getPeerX509Certificate() ?? null;
    certificates.set(socket, certificate);
  }
  return certificate ?? undefined;
}

function bearerOf(request: FastifyRequest): string | undefined {
  const header = request.headers.authorization;
  if (header?.slice(0, 7).toLowerCase() === 'bearer ') return header.slice(7).trim();
  // A browser cannot set headers on a WebSocket: the token comes as an offered subprotocol.
  const offered = request.headers['sec-websocket-protocol'];
  return offered
    ?.split(',')
    .map((each) => each.trim())
    .find((each) => each.startsWith('bearer.'))
    ?.slice('bearer.'.length);
}

/**
 * A browser shows its user's certificate for whichever page asks, and opens WebSockets for any of them. `Origin` says
 * which page asks: one of our own or of `corsOrigins` may. What is no browser sends none.
 */
function requireKnownPage({ config }: Cloudlet, { headers: { origin, host } }: FastifyRequest): void {
  if (origin === undefined || config.corsOrigins.includes(origin)) return;
  if (host !== undefined && URL.parse(origin)?.host === host) return;
  const message = `A web page of ${origin.slice(0, 100)} may not call this cloudlet: corsOrigins does not name it`;
  throw new AppError('forbidden', message, { origin: origin.slice(0, 100) });
}

/**
 * Notes the caller on the request, or refuses: 401 for no good credential, 403 for too small a one or a page that is
 * not allowed.
 */
export function authorize(cloudlet: Cloudlet, access: Access, request: FastifyRequest): void {
  if (access === 'open') return;
  requireKnownPage(cloudlet, request);
  const caller = cloudlet.credentials.authenticate({
    bearer: bearerOf(request),
    peerCertificate: peerCertificate(request),
  });
  callers.set(request, caller);
  if (access === 'any') return;
  const enough: readonly string[] = access === 'read-or-peer' ? ['read', 'peer'] : [access];
  if (caller.scopes.some((scope) => enough.includes(scope))) return;
  cloudlet.metrics.countRefusedCaller('scope');
  throw new AppError('forbidden', `The credential '${caller.name}' lacks the scope ${enough.join(' or ')}`, {
    wanted: enough,
    scopes: caller.scopes,
  });
}
