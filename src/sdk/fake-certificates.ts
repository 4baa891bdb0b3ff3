/** For tests only: a CA, and certificates that it has signed for 127.0.0.1 and localhost. */

// Before @peculiar/x509, which wants the metadata functions of Reflect.
import 'reflect-metadata';
import * as x509 from '@peculiar/x509';

const algorithm = { name: 'ECDSA', namedCurve: 'P-256', hash: 'SHA-256' };
x509.cryptoProvider.set(globalThis.crypto);

export interface FakeCertificate {
  /** PEM. */
  certificate: string;
  key: string;
}

export interface FakeCa {
  /** PEM. */
  certificate: string;
  issue(name: string): Promise<FakeCertificate>;
}

export async function fakeCa(): Promise<FakeCa> {
  const keys = await newKeys();
  const ca = await x509.X509CertificateGenerator.createSelfSigned({
    name: 'CN=Fake fleet',
    keys,
    signingAlgorithm: algorithm,
    notBefore: new Date(Date.now() - 60_000),
    notAfter: new Date(Date.now() + 3_600_000),
    extensions: [new x509.BasicConstraintsExtension(true, undefined, true)],
  });
  return {
    certificate: ca.toString('pem'),
    async issue(name) {
      const own = await newKeys();
      const certificate = await x509.X509CertificateGenerator.create({
        subject: `CN=${name}`,
        issuer: ca.subject,
        publicKey: own.publicKey,
        signingKey: keys.privateKey,
        signingAlgorithm: algorithm,
        notBefore: new Date(Date.now() - 60_000),
        notAfter: new Date(Date.now() + 3_600_000),
        extensions: [
          new x509.SubjectAlternativeNameExtension([
            { type: 'dns', value: 'localhost' },
            { type: 'ip', value: '127.0.0.1' },
          ]),
        ],
      });
      return { certificate: certificate.toString('pem'), key: await pemOf(own.privateKey) };
    },
  };
}

const newKeys = () => globalThis.crypto.subtle.generateKey(algorithm, true, ['sign', 'verify']);

async function pemOf(key: CryptoKey): Promise<string> {
  const bytes = await globalThis.crypto.subtle.exportKey('pkcs8', key);
  return x509.PemConverter.encode(bytes, 'PRIVATE KEY');
}
