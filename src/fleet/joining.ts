/**
 * The joiner's side of joining. It trusts one thing, the fingerprint of the fleet's CA in its token, in three steps:
 *
 *   1. a first connection fetches the CA's certificate from the chain that the other side shows, and is closed. It is
 *      the right one if its fingerprint is the pinned one; nothing but a TLS greeting was sent
 *   2. a second one trusts that CA alone and is good only if the other side proves to be the founder of the fleet
 *   3. on it go the token and a certificate request, and back comes a certificate that is checked against both
 */
import { createPrivateKey, X509Certificate } from 'node:crypto';
import { isIP } from 'node:net';
import { connect, type DetailedPeerCertificate } from 'node:tls';
import { AppError } from '../model/errors.ts';
import type { Peer } from '../model/fleet.ts';
import { isUuid, newId, type Uuid } from '../model/ids.ts';
import { normaliseCloudletUrl, requireAddress } from './address.ts';
import type { Admission } from './admission.ts';
import { createKey, createSigningRequest, isValidAt, parseCertificate, readMember } from './certificates.ts';
import { certificateFingerprint } from './fingerprint.ts';
import { type CloudletIdentity, stageIdentity } from './identity.ts';
import { pinOf } from './join-token.ts';
import { asPeerError, createAgent, exchange, untrusted } from './peer-client.ts';
import { parsePeers } from './peer-entry.ts';

export interface Joining {
  /** The state directory; made if there is none. */
  directory: string;
  name: string;
  /** Where others reach this cloudlet. */
  url: string;
  founderUrl: string;
  token: string;
  signal?: AbortSignal | undefined;
  now?: () => number;
}

const GREETING_TIMEOUT_MS = 10_000;
const ADMISSION_TIMEOUT_MS = 30_000;
const MAX_CHAIN = 8;

/**
 * Makes this directory a cloudlet of the founder's fleet, and gives the peers that it has there. When it fails the
 * directory is as before; the token may be used up if the answer of the founder was lost.
 * Errors: `invalid_request`, `name_taken`, `peer_unreachable`, `peer_untrusted`, `timeout`, or the founder's own.
 */
export async function joinFleet(joining: Joining): Promise<{ identity: CloudletIdentity; peers: Peer[] }> {
  const { directory, name, token, signal, now = Date.now } = joining;
  const url = requireAddress(name, joining.url);
  const founderUrl = requireFounderUrl(joining.founderUrl);
  const caFingerprint = pinOf(token);
  await using staged = await stageIdentity(directory);
  const caCertificate = await fetchPinnedCa(founderUrl, caFingerprint, signal);
  const id = newId();
  const key = await createKey();
  const csr = await createSigningRequest(name, key);
  const request = { token, id, name, url, csr };
  const { founderId, answer } = await askToJoin({ founderUrl, caCertificate, signal }, request);
  const { certificate, fleetId, peers } = checkAdmission(answer, {
    caCertificate,
    id,
    key,
    founderUrl,
    now,
  });
  const identity = await staged.commit(
    { id, name, url, fleetId, caFingerprint, joinedAt: new Date(now()).toISOString(), founderId, founderUrl },
    { key, certificate, caCertificate },
  );
  return { identity, peers: peers.filter((peer) => peer.id !== id) };
}

/** The CA's certificate, PEM, out of the chain that a server shows. Errors: `peer_untrusted`, `peer_unreachable`. */
export async function fetchPinnedCa(url: string, fingerprint: string, signal?: AbortSignal): Promise<string> {
  const { hostname, port } = new URL(url);
  const host = hostname.replace(/^\[(.*)\]$/, '$1');
  signal?.throwIfAborted();
  const { promise, resolve, reject } = Promise.withResolvers<X509Certificate[]>();
  const socket = connect({
    host,
    port: Number(port || 443),
    ...(isIP(host) ? {} : { servername: host }),
    minVersion: 'TLSv1.3',
    // Nothing is trusted yet, and nothing is sent: the chain is only looked at.
    rejectUnauthorized: false,
  });
  const onAbort = () => reject(signal?.reason);
  signal?.addEventListener('abort', onAbort);
  socket.setTimeout(GREETING_TIMEOUT_MS, () =>
    reject(new Error(`no TLS greeting in ${GREETING_TIMEOUT_MS} ms`)),
  );
  socket.once('secureConnect', () => resolve(chainOf(socket.getPeerCertificate(true))));
  socket.once('error', reject);
  socket.once('close', () => reject(new Error('the connection was closed')));
  try {
    const chain = await promise;
    const ca = chain.find((each) => certificateFingerprint(each) === fingerprint);
    if (ca) return ca.toString();
    const shown = chain.map(certificateFingerprint).join(', ');
    throw untrusted(
      url,
      `it shows no certificate with the pinned fingerprint ${fingerprint}, but ${shown || 'none'}`,
    );
  } catch (error) {
    signal?.throwIfAborted();
    throw asPeerError(error, url);
  } finally {
    signal?.removeEventListener('abort', onAbort);
    socket.on('error', () => {});
    socket.destroy();
  }
}

function chainOf(leaf: DetailedPeerCertificate): X509Certificate[] {
  const chain: X509Certificate[] = [];
  let at: DetailedPeerCertificate | undefined = leaf;
  while (at?.raw && chain.length < MAX_CHAIN) {
    chain.push(new X509Certificate(at.raw));
    // A self-signed certificate is its own issuer.
    at = at.issuerCertificate === at ? undefined : at.issuerCertificate;
  }
  return chain;
}

async function askToJoin(
  at: { founderUrl: string; caCertificate: string; signal: AbortSignal | undefined },
  json: { token: string; id: Uuid; name: string; url: string; csr: string },
): Promise<{ founderId: Uuid; answer: unknown }> {
  let founderId: Uuid | undefined;
  const agent = createAgent({ ca: at.caCertificate }, ({ founderOf, cloudletId, name }) => {
    if (founderOf === undefined)
      return `it is ${name}, a member of the fleet, but not the founder, who alone admits`;
    founderId = cloudletId;
    return undefined;
  });
  try {
    const init = { method: 'POST', json, signal: at.signal, timeoutMs: ADMISSION_TIMEOUT_MS } as const;
    const answer = await exchange(at.founderUrl, '/v1/fleet/members', init, agent);
    return { founderId: founderId!, answer };
  } finally {
    agent.destroy();
  }
}

/** What the founder answered, if it is what was asked for. Errors: `peer_untrusted`. */
function checkAdmission(
  answer: unknown,
  wanted: { caCertificate: string; id: Uuid; key: string; founderUrl: string; now: () => number },
): Admission {
  const { certificate, caCertificate, fleetId, peers: list } = (answer ?? {}) as Record<string, unknown>;
  const peers = parsePeers(list);
  const flaw = (why: string) => untrusted(wanted.founderUrl, `its answer is not good: ${why}`);
  if (typeof certificate !== 'string' || typeof fleetId !== 'string' || !isUuid(fleetId) || !peers) {
    throw flaw('it wants certificate, fleetId or peers');
  }
  checkOwnCertificate(certificate, { ...wanted, nowMs: wanted.now() }, flaw);
  // What else the founder says of the CA does not matter: the pinned one is used.
  if (caCertificate !== undefined && typeof caCertificate !== 'string')
    throw flaw('caCertificate is no text');
  return { certificate, caCertificate: wanted.caCertificate, fleetId, peers };
}

/** Checks a certificate that was signed for us: our key, our id, our fleet's CA, valid now. */
export function checkOwnCertificate(
  certificate: string,
  own: { caCertificate: string; id: Uuid; key: string; nowMs: number },
  flaw: (why: string) => AppError,
): void {
  let parsed: X509Certificate;
  try {
    parsed = parseCertificate(certificate);
  } catch (error) {
    throw flaw(`the certificate cannot be read (${(error as Error).message})`);
  }
  const member = readMember(parsed, parseCertificate(own.caCertificate));
  if (!member) throw flaw('the CA of the fleet did not sign the certificate');
  if (member.cloudletId !== own.id) throw flaw(`the certificate is for cloudlet ${member.cloudletId}`);
  if (!parsed.checkPrivateKey(createPrivateKey(own.key))) throw flaw('the certificate is for another key');
  if (!isValidAt(member, own.nowMs)) throw flaw('the certificate is not valid now: compare the clocks');
}

function requireFounderUrl(text: string): string {
  const url = normaliseCloudletUrl(text);
  if (url !== undefined) return url;
  throw new AppError('invalid_request', `Cannot join at ${JSON.stringify(text)}: wanted https://HOST:PORT.`, {
    problems: [{ field: 'founderUrl', value: text, wanted: 'https://HOST or https://HOST:PORT' }],
  });
}
