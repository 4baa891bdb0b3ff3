/** The cloudlets that know each other. */
import { Type } from 'typebox';
import { Exact, Fingerprint, HttpsUrl, Name, Time, Uuid } from './basics.ts';

export const Peer = Exact({
  id: Uuid,
  name: Name,
  url: HttpsUrl,
  certificateFingerprint: Fingerprint,
  joinedAt: Time,
  lastSeenAt: Type.Optional(Time),
});
export const PeerList = Exact({
  items: Type.Array(Peer, { maxItems: 10_000 }),
  removed: Type.Array(Uuid, {
    maxItems: 10_000,
    description: 'Put out of the fleet, as this cloudlet sees it.',
  }),
});
export const CreateJoinToken = Exact({
  expiresInS: Type.Optional(Type.Integer({ minimum: 1, maximum: 30 * 24 * 3600, default: 3600 })),
});
export const JoinToken = Exact({ token: Type.String(), expiresAt: Time });
const Pem = Type.String({ maxLength: 20_000 });
export const JoinMember = Exact({
  token: Type.String({ maxLength: 200 }),
  id: Uuid,
  name: Name,
  url: HttpsUrl,
  csr: Pem,
});
export const JoinedMember = Exact({
  certificate: Pem,
  caCertificate: Pem,
  fleetId: Uuid,
  peers: Type.Array(Peer),
});

export const RenewCertificate = Exact({ csr: Pem });
export const RenewedCertificate = Exact({ certificate: Pem });
