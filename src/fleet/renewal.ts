/** A new certificate for the same cloudlet and the same key, before the old one runs out. */
import { createSigningRequest, signMember } from './certificates.ts';
import { type CloudletIdentity, replaceCertificate } from './identity.ts';
import { requireCaKey } from './join-token.ts';
import { checkOwnCertificate } from './joining.ts';
import { untrusted } from './peer-client.ts';

export interface Renewal {
  /** Has the founder sign the request (`signRenewal` there). The founder needs none. */
  sign?: (csr: string) => Promise<string>;
  now?: () => number;
}

/**
 * Gets and saves the new certificate, and gives the identity that has it; the old one stays valid until it ends.
 * Errors: those of `sign`, `peer_untrusted` if what came back is not good, `unsupported` for a member without `sign`.
 */
export async function renewCertificate(
  identity: CloudletIdentity,
  { sign, now = Date.now }: Renewal = {},
): Promise<CloudletIdentity> {
  const csr = await createSigningRequest(identity.name, identity.key);
  const certificate = await (sign ?? signByOwnCa(identity, now))(csr);
  checkOwnCertificate(certificate, { ...identity, nowMs: now() }, (why) =>
    untrusted('The renewed certificate', why),
  );
  return replaceCertificate(identity, certificate);
}

function signByOwnCa(identity: CloudletIdentity, now: () => number): (csr: string) => Promise<string> {
  requireCaKey(identity);
  const ca = { certificate: identity.caCertificate, key: identity.caKey };
  return (csr) => signMember(ca, csr, { ...identity, founderOf: identity.fleetId }, now());
}
