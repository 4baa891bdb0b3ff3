/** For tests only: a fleet's CA with certificates for cloudlets, and the identify function that reads them. */
import 'reflect-metadata';
import * as x509 from '@peculiar/x509';
import type { LinkCredentials } from './connect.ts';
import type { Identify } from './identify.ts';

const algorithm = { name: 'ECDSA', namedCurve: 'P-256', hash: 'SHA-256' };
const prefix = 'urn:viper:cloudlet:';
const hourMs = 3_600_000;

export interface FakeFleet {
  /** PEM. */
  ca: string;
  /** Credentials of a cloudlet; expired since an hour if wanted. */
  issue(cloudletId: string, options?: { expired?: boolean }): Promise<LinkCredentials>;
}

export async function fakeFleet(): Promise<FakeFleet> {
  const keys = await newKeys();
  const nowMs = Date.now();
  const ca = await x509.X509CertificateGenerator.createSelfSigned({
    name: 'CN=Fake fleet',
    keys,
    signingAlgorithm: algorithm,
    notBefore: new Date(nowMs - 10 * hourMs),
    notAfter: new Date(nowMs + hourMs),
    extensions: [new x509.BasicConstraintsExtension(true, undefined, true)],
  });
  const caPem = ca.toString('pem');
  return {
    ca: caPem,
    async issue(cloudletId, { expired = false } = {}) {
      const own = await newKeys();
      const certificate = await x509.X509CertificateGenerator.create({
        subject: 'CN=cloudlet',
        issuer: ca.subject,
        publicKey: own.publicKey,
        signingKey: keys.privateKey,
        signingAlgorithm: algorithm,
        notBefore: new Date(nowMs - 5 * hourMs),
        notAfter: new Date(nowMs + (expired ? -hourMs : hourMs)),
        extensions: [
          new x509.SubjectAlternativeNameExtension([{ type: 'url', value: `${prefix}${cloudletId}` }]),
        ],
      });
      const key = x509.PemConverter.encode(
        await crypto.subtle.exportKey('pkcs8', own.privateKey),
        'PRIVATE KEY',
      );
      return { key, cert: certificate.toString('pem'), ca: caPem };
    },
  };
}

export const identifyFake: Identify = (certificate) => {
  const cloudletId = new RegExp(`URI:${prefix}([a-z]+)`).exec(certificate.subjectAltName ?? '')?.[1];
  return cloudletId ? { cloudletId } : { refused: 'it names no cloudlet' };
};

const newKeys = () => crypto.subtle.generateKey(algorithm, true, ['sign', 'verify']);
