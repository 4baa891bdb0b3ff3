/** The founder's side of joining. */
import { AppError } from '../model/errors.ts';
import type { Peer } from '../model/fleet.ts';
import { isUuid, type Uuid } from '../model/ids.ts';
import { requireAddress } from './address.ts';
import { parseCertificate, signMember } from './certificates.ts';
import { certificateFingerprint } from './fingerprint.ts';
import { asPeer, type CloudletIdentity } from './identity.ts';
import { findJoinToken, requireCaKey, usedBefore } from './join-token.ts';
import type { PeerDirectory } from './peers.ts';
import type { FleetState } from './state.ts';

export interface JoinRequest {
  token: string;
  id: Uuid;
  name: string;
  url: string;
  /** PKCS#10 in PEM. */
  csr: string;
}

export interface Admission {
  /** PEM. */
  certificate: string;
  caCertificate: string;
  fleetId: Uuid;
  /** The fleet as it is, the founder first and without the one who joined. */
  peers: Peer[];
}

export interface Admitter {
  identity: CloudletIdentity;
  state: Pick<FleetState, 'joinTokens' | 'transact'>;
  peers: PeerDirectory;
  now?: () => number;
}

/**
 * Signs the certificate of a cloudlet that shows a join token. The token is used up in the transaction that enters the
 * peer: of two who bring the same one, the second gets nothing.
 * Errors: `unsupported` if this is not the founder, `unauthenticated` for the token, `invalid_request`, `name_taken`,
 * `too_many`.
 */
export async function admitMember(admitter: Admitter, request: JoinRequest): Promise<Admission> {
  const { identity, state, peers, now = Date.now } = admitter;
  requireCaKey(identity);
  const token = findJoinToken(state, request.token, now());
  const { id, name, csr } = request;
  const url = requireAddress(name, request.url);
  refuseTaken(admitter, { id, name });
  const ca = { certificate: identity.caCertificate, key: identity.caKey };
  const certificate = await signMember(ca, csr, { id, name, url }, now());
  const at = new Date(now()).toISOString();
  const others = peers.list().filter((peer) => peer.id !== id);
  state.transact(() => {
    // While the certificate was being signed, others may have come first.
    if (!state.joinTokens.use(token.id, id, at)) throw usedBefore();
    refuseTaken(admitter, { id, name });
    const fingerprint = certificateFingerprint(parseCertificate(certificate));
    peers.admit({ id, name, url, certificateFingerprint: fingerprint, joinedAt: at, lastSeenAt: at });
  });
  const { caCertificate, fleetId } = identity;
  return { certificate, caCertificate, fleetId, peers: [{ ...asPeer(identity), lastSeenAt: at }, ...others] };
}

/**
 * Signs a new certificate for a member that has shown its present one: same id, name and key type, its URL as known.
 * Errors: `unsupported`, `invalid_request`, `not_found` if the member is not known or removed.
 */
export async function signRenewal(
  { identity, peers, now = Date.now }: Omit<Admitter, 'state'>,
  member: { cloudletId: Uuid; csr: string },
): Promise<string> {
  requireCaKey(identity);
  const peer = peers.get(member.cloudletId);
  if (!peer) {
    const name = member.cloudletId;
    throw new AppError('not_found', `There is no peer ${name} whose certificate to renew.`, {
      kind: 'peer',
      name,
    });
  }
  return signMember({ certificate: identity.caCertificate, key: identity.caKey }, member.csr, peer, now());
}

function refuseTaken({ identity, peers }: Admitter, { id, name }: { id: Uuid; name: string }): void {
  if (!isUuid(id)) {
    throw new AppError(
      'invalid_request',
      `A cloudlet cannot have the id ${JSON.stringify(id)}: wanted a UUID.`,
      {
        problems: [{ field: 'id', value: id, wanted: 'a UUID in lower case' }],
      },
    );
  }
  const all = [asPeer(identity), ...peers.list()];
  const other = all.find((peer) => peer.id === id || peer.name === name);
  if (!other) return;
  const what = other.id === id ? `id ${id}` : `name ${name}`;
  throw new AppError('name_taken', `Cannot admit the cloudlet: another one of the fleet has the ${what}.`, {
    kind: 'cloudlet',
    name: other.id === id ? id : name,
  });
}
