/** Which cloudlet of the fleet a caller's certificate stands for. */
import type { X509Certificate } from 'node:crypto';
import type { Uuid } from '../model/ids.ts';
import { type CertifiedCloudlet, isValidAt, parseCertificate, readMember } from './certificates.ts';
import type { PeerDirectory } from './peers.ts';

const CACHE_LIMIT = 2000;

export class FleetTrust {
  readonly #ca: X509Certificate;
  readonly #peers: Pick<PeerDirectory, 'isRemoved'>;
  readonly #now: () => number;
  /** By fingerprint: the signature is checked once, time and removal each time. */
  readonly #members = new Map<string, CertifiedCloudlet>();

  constructor(
    identity: { caCertificate: string },
    peers: Pick<PeerDirectory, 'isRemoved'>,
    now: () => number = Date.now,
  ) {
    this.#ca = parseCertificate(identity.caCertificate);
    this.#peers = peers;
    this.#now = now;
  }

  /**
   * Whose certificate it is; undefined if the fleet's CA did not sign it for a cloudlet. One that is not in the
   * directory yet is let through, because the CA's signature is its admission: so a new member can announce itself.
   * One that was removed is `revoked`.
   */
  identify(
    certificate: X509Certificate,
  ): { cloudletId: Uuid; name: string } | 'expired' | 'revoked' | undefined {
    const member = this.#read(certificate);
    if (!member) return undefined;
    if (!isValidAt(member, this.#now())) return 'expired';
    if (this.#peers.isRemoved(member.cloudletId)) return 'revoked';
    return { cloudletId: member.cloudletId, name: member.name };
  }

  #read(certificate: X509Certificate): CertifiedCloudlet | undefined {
    const key = certificate.fingerprint256;
    const known = this.#members.get(key);
    if (known) return known;
    const member = readMember(certificate, this.#ca);
    if (!member) return undefined;
    if (this.#members.size >= CACHE_LIMIT) this.#members.delete(this.#members.keys().next().value!);
    this.#members.set(key, member);
    return member;
  }
}
