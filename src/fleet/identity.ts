/**
 * Who this cloudlet is, and where that lies on the disk:
 *
 *   <state>/identity/cloudlet.json   id, name, URL, fleet
 *                    cloudlet.key    own key, 0600      cloudlet.crt   own certificate
 *                    ca.crt          the fleet's CA     ca.key         only at the founder, 0600
 *
 * Invariant: `identity` appears whole, by one rename, or not at all; and it never replaces another one.
 */
import { createPrivateKey, type X509Certificate } from 'node:crypto';
import { mkdir, open, readFile, rename, rm, rmdir, stat } from 'node:fs/promises';
import { dirname, join, resolve } from 'node:path';
import { AppError } from '../model/errors.ts';
import type { Peer } from '../model/fleet.ts';
import { isUuid, newId, type Uuid } from '../model/ids.ts';
import { isCloudletName, normaliseCloudletUrl } from './address.ts';
import { parseCertificate, readMember } from './certificates.ts';
import { certificateFingerprint } from './fingerprint.ts';

/** What `cloudlet.json` holds. */
export interface CloudletFacts {
  id: Uuid;
  name: string;
  url: string;
  fleetId: Uuid;
  /** SHA-256 of the CA's certificate, lower-case hex. */
  caFingerprint: string;
  joinedAt: string;
  /** Who renews the certificate, and where it was when this cloudlet joined; absent at the founder. */
  founderId?: Uuid;
  founderUrl?: string;
}

/** Keys and certificates, PEM. */
export interface CloudletKeys {
  key: string;
  certificate: string;
  caCertificate: string;
  caKey?: string;
}

export interface CloudletIdentity extends CloudletFacts, CloudletKeys {
  directory: string;
  /** For a TLS server or client: the chain has the CA in it, so that joiners can compare it with their pin. */
  tls: { key: string; cert: string; ca: string };
}

/** An identity directory that is being filled. Disposed before `commit`, it leaves nothing. */
export interface StagedIdentity extends AsyncDisposable {
  commit(facts: CloudletFacts, keys: CloudletKeys): Promise<CloudletIdentity>;
}

const identityDirectory = (directory: string): string => join(directory, 'identity');

/**
 * Begins an identity in a state directory, which is made if there is none.
 * Errors: `name_taken` if it holds a cloudlet already, here or at `commit`.
 */
export async function stageIdentity(directory: string): Promise<StagedIdentity> {
  const target = identityDirectory(directory);
  if (await exists(target)) throw alreadyThere(directory);
  const madeDirectory = await mkdir(directory, { recursive: true, mode: 0o700 });
  const staging = `${target}.new-${newId()}`;
  await mkdir(staging, { mode: 0o700 });
  let committed = false;
  return {
    async commit(facts, keys) {
      await writeDurably(join(staging, 'cloudlet.json'), `${JSON.stringify(facts, null, 2)}\n`);
      await writeDurably(join(staging, 'cloudlet.key'), keys.key);
      await writeDurably(join(staging, 'cloudlet.crt'), keys.certificate);
      await writeDurably(join(staging, 'ca.crt'), keys.caCertificate);
      if (keys.caKey !== undefined) await writeDurably(join(staging, 'ca.key'), keys.caKey);
      await syncDirectory(staging);
      await rename(staging, target).catch((error: NodeJS.ErrnoException) => {
        throw error.code === 'ENOTEMPTY' || error.code === 'EEXIST' ? alreadyThere(directory) : error;
      });
      committed = true;
      await syncDirectory(directory);
      return assemble(directory, facts, keys);
    },
    async [Symbol.asyncDispose]() {
      if (committed) return;
      await rm(staging, { recursive: true, force: true });
      if (madeDirectory !== undefined) await removeEmpty(directory, madeDirectory);
    },
  };
}

/**
 * Reads the identity of a state directory and checks that its parts belong together. An expired certificate is
 * let through: the cloudlet must start to renew it.
 * Errors: `not_initialised`, `wrong_state` if a key can be read by others or the files contradict each other.
 */
export async function loadCloudlet(directory: string): Promise<CloudletIdentity> {
  const at = (file: string) => join(identityDirectory(directory), file);
  if (!(await exists(at('cloudlet.json')))) {
    throw new AppError('not_initialised', `${directory} holds no cloudlet: make one with \`viper init\`.`, {
      directory,
    });
  }
  const text = await readFile(at('cloudlet.json'), 'utf8');
  const keys = await readKeys(at);
  const facts = parseFacts(text);
  const flaw = facts ? contradiction(facts, keys) : 'cloudlet.json is damaged';
  if (facts && flaw === undefined) return assemble(directory, facts, keys);
  throw new AppError('wrong_state', `Cannot load the cloudlet in ${directory}: ${flaw}.`, {
    state: flaw,
    allowed: ['restore the identity directory from a backup'],
  });
}

/** Puts a new certificate in the place of the old one, at once and whole. */
export async function replaceCertificate(
  identity: CloudletIdentity,
  certificate: string,
): Promise<CloudletIdentity> {
  const directory = identityDirectory(identity.directory);
  const path = join(directory, 'cloudlet.crt');
  const staging = `${path}.new-${newId()}`;
  try {
    await writeDurably(staging, certificate);
    await rename(staging, path);
  } finally {
    await rm(staging, { force: true });
  }
  await syncDirectory(directory);
  return assemble(identity.directory, factsOf(identity), { ...keysOf(identity), certificate });
}

/** Days until a certificate runs out, negative once it has: the cloudlet's own one or any other. */
export function certificateExpiresInDays(of: { certificate: string }, nowMs = Date.now()): number {
  return (parseCertificate(of.certificate).validToDate.getTime() - nowMs) / (24 * 3_600_000);
}

/** This cloudlet as its peers list it. */
export const asPeer = (identity: CloudletIdentity): Peer => ({
  id: identity.id,
  name: identity.name,
  url: identity.url,
  certificateFingerprint: certificateFingerprint(parseCertificate(identity.certificate)),
  joinedAt: identity.joinedAt,
});

function assemble(directory: string, facts: CloudletFacts, keys: CloudletKeys): CloudletIdentity {
  const { key, certificate, caCertificate } = keys;
  const tls = { key, cert: `${certificate.trimEnd()}\n${caCertificate}`, ca: caCertificate };
  return { ...facts, ...keys, directory, tls };
}

const factsOf = (identity: CloudletIdentity): CloudletFacts => {
  const { id, name, url, fleetId, caFingerprint, joinedAt, founderId, founderUrl } = identity;
  const founder = founderId === undefined ? {} : { founderId };
  return { id, name, url, fleetId, caFingerprint, joinedAt, ...founder, ...(founderUrl && { founderUrl }) };
};

const keysOf = ({ key, certificate, caCertificate, caKey }: CloudletIdentity): CloudletKeys => ({
  key,
  certificate,
  caCertificate,
  ...(caKey === undefined ? {} : { caKey }),
});

async function readKeys(at: (file: string) => string): Promise<CloudletKeys> {
  const keys: CloudletKeys = {
    key: await readPrivate(at('cloudlet.key')),
    certificate: await readFile(at('cloudlet.crt'), 'utf8'),
    caCertificate: await readFile(at('ca.crt'), 'utf8'),
  };
  return (await exists(at('ca.key'))) ? { ...keys, caKey: await readPrivate(at('ca.key')) } : keys;
}

/** What does not fit together; undefined if all does. */
function contradiction(facts: CloudletFacts, keys: CloudletKeys): string | undefined {
  let ca: X509Certificate;
  try {
    ca = parseCertificate(keys.caCertificate);
    const certificate = parseCertificate(keys.certificate);
    if (!certificate.checkPrivateKey(createPrivateKey(keys.key)))
      return 'cloudlet.key is not the key of cloudlet.crt';
    if (readMember(certificate, ca)?.cloudletId !== facts.id)
      return 'cloudlet.crt is not of this cloudlet and fleet';
    if (keys.caKey && !ca.checkPrivateKey(createPrivateKey(keys.caKey)))
      return 'ca.key is not the key of ca.crt';
  } catch (error) {
    return `a key or certificate cannot be read (${(error as Error).message})`;
  }
  return certificateFingerprint(ca) === facts.caFingerprint
    ? undefined
    : 'ca.crt is not the CA in cloudlet.json';
}

function parseFacts(text: string): CloudletFacts | undefined {
  let facts: Partial<CloudletFacts>;
  try {
    facts = JSON.parse(text) as Partial<CloudletFacts>;
  } catch {
    return undefined;
  }
  const good =
    isUuid(String(facts.id)) &&
    isUuid(String(facts.fleetId)) &&
    isCloudletName(String(facts.name)) &&
    normaliseCloudletUrl(String(facts.url)) !== undefined &&
    typeof facts.caFingerprint === 'string' &&
    typeof facts.joinedAt === 'string';
  return good ? (facts as CloudletFacts) : undefined;
}

/** Removes the directories that were made from `top` down to `bottom`, as long as nobody has put anything there. */
async function removeEmpty(bottom: string, top: string): Promise<void> {
  try {
    for (let path = resolve(bottom); path.length >= resolve(top).length; path = dirname(path))
      await rmdir(path);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOTEMPTY') throw error;
  }
}

/** Reads a file that is for its owner alone. */
async function readPrivate(path: string): Promise<string> {
  const mode = (await stat(path)).mode & 0o777;
  if ((mode & 0o077) === 0) return readFile(path, 'utf8');
  throw new AppError('wrong_state', `Others can read the key ${path}. Run: chmod 600 ${path}`, {
    state: `mode ${mode.toString(8)}`,
    allowed: [`chmod 600 ${path}`],
  });
}

async function writeDurably(path: string, text: string): Promise<void> {
  await using file = await open(path, 'wx', 0o600);
  await file.writeFile(text);
  await file.sync();
}

async function syncDirectory(path: string): Promise<void> {
  await using directory = await open(path, 'r');
  await directory.sync();
}

const exists = (path: string): Promise<boolean> =>
  stat(path).then(
    () => true,
    (error: NodeJS.ErrnoException) => {
      if (error.code === 'ENOENT') return false;
      throw error;
    },
  );

const alreadyThere = (directory: string): AppError =>
  new AppError('name_taken', `Cannot make a cloudlet in ${directory}: it holds one already.`, {
    kind: 'cloudlet',
    name: directory,
  });
