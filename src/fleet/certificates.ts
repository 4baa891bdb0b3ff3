/**
 * The certificates of a fleet. One CA, whose key lies at the cloudlet that founded the fleet, signs one certificate for
 * each member. What a certificate says of its holder comes from the CA, never from the request:
 *
 *   CN                                 the cloudlet's name
 *   URI urn:viper:cloudlet:<id>        who it is; callers check this and not the address
 *   URI urn:viper:founder:<fleet id>   only the founder has it: joiners give their token to nobody else
 *   DNS, IP                            the host of its URL, localhost, 127.0.0.1: for browsers and plain clients
 */
import { createPrivateKey, KeyObject, X509Certificate } from 'node:crypto';
import { isIP } from 'node:net';
import type * as X509 from '@peculiar/x509';
import { AppError } from '../model/errors.ts';
import { isUuid, namePattern, type Uuid } from '../model/ids.ts';

const algorithm = { name: 'ECDSA', namedCurve: 'P-256', hash: 'SHA-256' };
const dayMs = 24 * 3_600_000;
const CA_LIFE_MS = 3650 * dayMs;
export const CERTIFICATE_LIFE_MS = 365 * dayMs;
/** Certificates begin this much in the past, because the clocks of sites differ. */
const CLOCK_SKEW_MS = 3_600_000;
const CLIENT_AUTH = '1.3.6.1.5.5.7.3.2';

/**
 * Signing is rare, and its library weighs about 10 MB in memory: it is loaded when it is needed. It wants the
 * metadata functions of Reflect to be there first.
 */
async function signer(): Promise<typeof X509> {
  await import('reflect-metadata');
  return import('@peculiar/x509');
}

const cloudletPrefix = 'urn:viper:cloudlet:';
const founderPrefix = 'urn:viper:founder:';
const commonName = new RegExp(`^CN=(${namePattern.slice(1, -1)})$`);

/** A certificate with the key that belongs to it, both PEM. */
export interface KeyPair {
  certificate: string;
  key: string;
}

export interface MemberFacts {
  id: Uuid;
  name: string;
  url: string;
  /** The fleet that it founded; absent for a member that joined. */
  founderOf?: Uuid | undefined;
}

/** What a certificate that the fleet's CA signed says of its holder. */
export interface CertifiedCloudlet {
  cloudletId: Uuid;
  name: string;
  founderOf?: Uuid;
  validFromMs: number;
  validToMs: number;
}

export async function createCa(fleetId: Uuid, nowMs: number): Promise<KeyPair> {
  const x509 = await signer();
  const keys = await crypto.subtle.generateKey(algorithm, true, ['sign', 'verify']);
  const certificate = await x509.X509CertificateGenerator.createSelfSigned({
    name: `CN=Viper fleet ${fleetId}`,
    keys,
    signingAlgorithm: algorithm,
    notBefore: new Date(nowMs - CLOCK_SKEW_MS),
    notAfter: new Date(nowMs + CA_LIFE_MS),
    extensions: [
      new x509.BasicConstraintsExtension(true, 0, true),
      new x509.KeyUsagesExtension(x509.KeyUsageFlags.keyCertSign | x509.KeyUsageFlags.cRLSign, true),
      await x509.SubjectKeyIdentifierExtension.create(keys.publicKey),
    ],
  });
  return { certificate: certificate.toString('pem'), key: exportKey(keys.privateKey) };
}

export async function createKey(): Promise<string> {
  const keys = await crypto.subtle.generateKey(algorithm, true, ['sign', 'verify']);
  return exportKey(keys.privateKey);
}

/** A PKCS#10 request, signed by the key: it proves that whoever asks has it. */
export async function createSigningRequest(name: string, key: string): Promise<string> {
  const x509 = await signer();
  const request = await x509.Pkcs10CertificateRequestGenerator.create({
    name: `CN=${name}`,
    keys: await importKeyPair(key),
    signingAlgorithm: algorithm,
  });
  return request.toString('pem');
}

/**
 * Signs the key of a request for a member; of the request nothing else is taken over.
 * Errors: `invalid_request` if the request is damaged, not signed by its key, or the key is no P-256 one.
 */
export async function signMember(
  ca: KeyPair,
  csr: string,
  member: MemberFacts,
  nowMs: number,
): Promise<string> {
  const x509 = await signer();
  const publicKey = await provenKey(csr);
  const issuer = new x509.X509Certificate(ca.certificate);
  const caEndsMs = issuer.notAfter.getTime();
  const certificate = await x509.X509CertificateGenerator.create({
    subject: `CN=${member.name}`,
    issuer: issuer.subject,
    publicKey,
    signingKey: await importSigningKey(ca.key),
    signingAlgorithm: algorithm,
    notBefore: new Date(nowMs - CLOCK_SKEW_MS),
    notAfter: new Date(Math.min(nowMs + CERTIFICATE_LIFE_MS, caEndsMs)),
    extensions: [
      new x509.BasicConstraintsExtension(false, undefined, true),
      new x509.KeyUsagesExtension(x509.KeyUsageFlags.digitalSignature, true),
      new x509.ExtendedKeyUsageExtension([
        x509.ExtendedKeyUsage.serverAuth,
        x509.ExtendedKeyUsage.clientAuth,
      ]),
      new x509.SubjectAlternativeNameExtension(subjectNames(member)),
      await x509.SubjectKeyIdentifierExtension.create(publicKey),
      await x509.AuthorityKeyIdentifierExtension.create(issuer.publicKey),
    ],
  });
  return certificate.toString('pem');
}

/** Whose certificate it is, if the CA signed it for a cloudlet; undefined otherwise. Time is left to the caller. */
export function readMember(certificate: X509Certificate, ca: X509Certificate): CertifiedCloudlet | undefined {
  if (certificate.ca || !certificate.checkIssued(ca) || !certificate.verify(ca.publicKey)) return undefined;
  if (!certificate.keyUsage?.includes(CLIENT_AUTH)) return undefined;
  // Node quotes a name that holds a comma or a quote, so a plain item is one whole name.
  const uris = (certificate.subjectAltName ?? '')
    .split(', ')
    .filter((item) => item.startsWith('URI:'))
    .map((item) => item.slice('URI:'.length));
  const cloudletId = uris.find((uri) => uri.startsWith(cloudletPrefix))?.slice(cloudletPrefix.length);
  const founderOf = uris.find((uri) => uri.startsWith(founderPrefix))?.slice(founderPrefix.length);
  const name = commonName.exec(certificate.subject)?.[1];
  if (cloudletId === undefined || !isUuid(cloudletId) || name === undefined) return undefined;
  return {
    cloudletId,
    name,
    ...(founderOf === undefined ? {} : { founderOf }),
    validFromMs: certificate.validFromDate.getTime(),
    validToMs: certificate.validToDate.getTime(),
  };
}

export const isValidAt = ({ validFromMs, validToMs }: CertifiedCloudlet, nowMs: number): boolean =>
  validFromMs <= nowMs && nowMs < validToMs;

function subjectNames({ id, url, founderOf }: MemberFacts): X509.JsonGeneralNames {
  const host = new URL(url).hostname.replace(/^\[(.*)\]$/, '$1');
  const dns = new Set(isIP(host) ? ['localhost'] : ['localhost', host]);
  const ips = new Set(isIP(host) ? ['127.0.0.1', host] : ['127.0.0.1']);
  return [
    { type: 'url', value: `${cloudletPrefix}${id}` },
    ...(founderOf === undefined ? [] : [{ type: 'url' as const, value: `${founderPrefix}${founderOf}` }]),
    ...Array.from(dns, (value) => ({ type: 'dns' as const, value })),
    ...Array.from(ips, (value) => ({ type: 'ip' as const, value })),
  ];
}

async function provenKey(csr: string): Promise<X509.PublicKey> {
  const x509 = await signer();
  let why = 'it is no PKCS#10 request in PEM';
  try {
    const request = new x509.Pkcs10CertificateRequest(csr);
    why = 'its signature does not match its key';
    if (await request.verify()) {
      const { name, namedCurve } = request.publicKey.algorithm as EcKeyAlgorithm;
      if (name === algorithm.name && namedCurve === algorithm.namedCurve) return request.publicKey;
      why = 'its key is no ECDSA key on P-256';
    }
  } catch {
    // The library throws all sorts of errors for damaged bytes; `why` says how far it came.
  }
  throw new AppError('invalid_request', `Cannot sign the certificate request: ${why}.`, {
    problems: [
      { field: 'csr', value: csr.slice(0, 60), wanted: 'a PKCS#10 request in PEM, signed by a P-256 key' },
    ],
  });
}

const exportKey = (key: CryptoKey): string =>
  KeyObject.from(key).export({ type: 'pkcs8', format: 'pem' }).toString();

async function importSigningKey(pem: string): Promise<CryptoKey> {
  const der = createPrivateKey(pem).export({ type: 'pkcs8', format: 'der' });
  return crypto.subtle.importKey('pkcs8', der, algorithm, false, ['sign']);
}

async function importKeyPair(pem: string): Promise<CryptoKeyPair> {
  const der = createPrivateKey(pem).export({ type: 'pkcs8', format: 'der' });
  const extractable = await crypto.subtle.importKey('pkcs8', der, algorithm, true, ['sign']);
  const {
    d: _secret,
    key_ops: _operations,
    ...publicJwk
  } = await crypto.subtle.exportKey('jwk', extractable);
  const publicKey = await crypto.subtle.importKey('jwk', publicJwk, algorithm, true, ['verify']);
  return { privateKey: extractable, publicKey };
}

/** The certificate of a PEM text. Errors: whatever OpenSSL says. */
export const parseCertificate = (pem: string): X509Certificate => new X509Certificate(pem);
