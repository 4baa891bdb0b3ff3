/**
 * Who is at the other end of a TLS connection. The chain is checked by TLS against the fleet's CA; whom a good
 * certificate names is decided by a function of the caller, because the link knows no fleet.
 */
import type { X509Certificate } from 'node:crypto';
import type { TLSSocket } from 'node:tls';

/** Reads a certificate that the CA has signed: the cloudlet that it names, or why it names none. */
export type Identify = (certificate: X509Certificate) => { cloudletId: string } | { refused: string };

/** The peer of a connection whose TLS handshake is done. */
export function identifyPeer(
  socket: TLSSocket,
  identify: Identify,
): { cloudletId: string } | { refused: string } {
  if (!socket.authorized)
    return { refused: `its certificate was not accepted (${socket.authorizationError})` };
  const certificate = socket.getPeerX509Certificate();
  if (certificate === undefined) return { refused: 'it showed no certificate' };
  // A resumed TLS session is authorised by the check of the first one.
  if (certificate.validToDate.getTime() < Date.now()) return { refused: 'its certificate has expired' };
  return identify(certificate);
}
