/** How certificates are named: SHA-256 over the DER bytes, in lower-case hex. */
import type { X509Certificate } from 'node:crypto';

export const certificateFingerprint = (certificate: X509Certificate): string =>
  certificate.fingerprint256.replaceAll(':', '').toLowerCase();
