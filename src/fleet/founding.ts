/** A new cloudlet with a new fleet, whose first member it is. */
import { newId } from '../model/ids.ts';
import { requireAddress } from './address.ts';
import { createCa, createKey, createSigningRequest, parseCertificate, signMember } from './certificates.ts';
import { certificateFingerprint } from './fingerprint.ts';
import { type CloudletIdentity, stageIdentity } from './identity.ts';

export interface NewCloudlet {
  /** The state directory; made if there is none. */
  directory: string;
  name: string;
  /** Where others reach it: https, host and port. */
  url: string;
  now?: () => number;
}

/**
 * Makes the CA of a fleet and the identity of its founder.
 * Errors: `invalid_request`, `name_taken` if the directory holds a cloudlet.
 */
export async function createCloudlet(wanted: NewCloudlet): Promise<CloudletIdentity> {
  const { directory, name, now = Date.now } = wanted;
  const url = requireAddress(name, wanted.url);
  await using staged = await stageIdentity(directory);
  const id = newId();
  const fleetId = newId();
  const ca = await createCa(fleetId, now());
  const key = await createKey();
  const csr = await createSigningRequest(name, key);
  const certificate = await signMember(ca, csr, { id, name, url, founderOf: fleetId }, now());
  const caFingerprint = certificateFingerprint(parseCertificate(ca.certificate));
  return await staged.commit(
    { id, name, url, fleetId, caFingerprint, joinedAt: new Date(now()).toISOString() },
    { key, certificate, caCertificate: ca.certificate, caKey: ca.key },
  );
}
