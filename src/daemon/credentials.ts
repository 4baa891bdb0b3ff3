/**
 * Who calls. A caller shows a bearer token or a client certificate; both are found by a SHA-256, so the cost of a look
 * does not depend on how near a guess comes, and no secret is stored.
 *
 * Invariants: a secret leaves this file once, when it is made; a revoked or expired credential is refused from that
 * moment on; one admin credential always remains. The cache is exact, because this process alone writes the table.
 */
import { hash, randomBytes, type X509Certificate } from 'node:crypto';
import { certificateFingerprint } from '../fleet/fingerprint.ts';
import { AppError } from '../model/errors.ts';
import { newId, type Uuid } from '../model/ids.ts';
import type { CredentialRecord, CredentialScope, Page, PageRequest, Store } from './store/index.ts';

export type Scope = CredentialScope | 'peer';
export type RefusalReason = 'missing' | 'unknown' | 'expired' | 'revoked';

/** Who a request comes from and what it may do; `scopes` has every scope that the granted ones include. */
export type Principal =
  | { kind: 'credential'; credentialId: Uuid; name: string; scopes: readonly Scope[] }
  | { kind: 'cloudlet'; cloudletId: Uuid; name: string; scopes: readonly Scope[] };

/** What can be told about a credential. */
export type Credential = Omit<CredentialRecord, 'hash'> & { certificateFingerprint?: string };

export interface NewCredential {
  name: string;
  scopes: CredentialScope[];
  expiresInS?: number | undefined;
  /** Registers a client certificate instead of making a token. */
  certificateFingerprint?: string | undefined;
}

/**
 * Which cloudlet of the fleet a certificate belongs to, or why that cloudlet is refused; undefined if it is no
 * certificate of the fleet at all.
 */
export type IdentifyCloudlet = (
  certificate: X509Certificate,
) => { cloudletId: Uuid; name: string } | 'expired' | 'revoked' | undefined;

export interface CredentialsOptions {
  store: Store;
  identifyCloudlet?: IdentifyCloudlet;
  /** For counting. */
  onRefusal?: (reason: RefusalReason) => void;
  now?: () => number;
}

interface CacheEntry {
  record: CredentialRecord;
  lastUseWrittenMs: number;
}

const tokenPattern = /^vpr_[A-Za-z0-9_-]{43}$/;
const CACHE_LIMIT = 10_000;
const LAST_USE_INTERVAL_MS = 60_000;

const included: Record<CredentialScope, readonly CredentialScope[]> = {
  admin: ['admin', 'operate', 'read'],
  operate: ['operate', 'read'],
  read: ['read'],
  device: ['device'],
};

/** The same for an unknown and a revoked credential: whoever guesses must not learn that it was one once. */
const refusals: Record<RefusalReason, string> = {
  missing: 'The request shows no credential.',
  unknown: 'The credential is not valid.',
  expired: 'The credential has expired.',
  revoked: 'The credential is not valid.',
};

export class Credentials {
  readonly #store: Store;
  readonly #identifyCloudlet: IdentifyCloudlet;
  readonly #onRefusal: (reason: RefusalReason) => void;
  readonly #now: () => number;
  readonly #cache = new Map<string, CacheEntry>();

  constructor({ store, identifyCloudlet, onRefusal, now }: CredentialsOptions) {
    this.#store = store;
    this.#identifyCloudlet = identifyCloudlet ?? (() => undefined);
    this.#onRefusal = onRefusal ?? (() => {});
    this.#now = now ?? Date.now;
  }

  /**
   * The admin token of a cloudlet that is being set up. What an earlier attempt left, whose secret nobody was shown,
   * is revoked.
   */
  static createFirst(store: Store): { token: Credential; secret: string } {
    const credentials = new Credentials({ store });
    return store.transact(() => {
      for (const left of store.credentials.active()) {
        store.credentials.update({ ...left, revokedAt: credentials.#time(0) });
      }
      const { token, secret } = credentials.create({ name: 'admin', scopes: ['admin'] });
      return { token, secret: secret! };
    });
  }

  /**
   * Who shows these credentials. A token goes before a certificate: a bad one is refused even beside a good
   * certificate. The certificate must be the one that the TLS handshake proved possession of; whether the handshake
   * also trusted it does not matter. Errors: `unauthenticated`.
   */
  authenticate(shown: {
    bearer?: string | undefined;
    peerCertificate?: X509Certificate | undefined;
  }): Principal {
    const found = this.#identify(shown.bearer, shown.peerCertificate);
    if (typeof found !== 'string') return found;
    this.#onRefusal(found);
    throw new AppError('unauthenticated', refusals[found]);
  }

  /**
   * Makes a bearer token, whose secret is given this once, or registers a certificate.
   * Errors: `name_taken` for a name or certificate in use.
   */
  create(wanted: NewCredential): { token: Credential; secret?: string } {
    const { name, scopes, expiresInS, certificateFingerprint: fingerprint } = wanted;
    const secret = fingerprint === undefined ? `vpr_${randomBytes(32).toString('base64url')}` : undefined;
    const record: CredentialRecord = {
      id: newId(),
      name,
      kind: secret === undefined ? 'certificate' : 'bearer',
      hash: secret === undefined ? normaliseFingerprint(fingerprint!) : hash('sha256', secret),
      scopes,
      createdAt: this.#time(0),
      ...(expiresInS === undefined ? {} : { expiresAt: this.#time(expiresInS * 1000) }),
    };
    this.#store.credentials.insert(record);
    const token = withoutHash(record);
    return secret === undefined ? { token } : { token, secret };
  }

  /**
   * Takes in the token of a device that another cloudlet hands over with its VM: its hash, which is all that anybody
   * keeps of it. It is good for nothing but the device's own routes. Gives the id of the credential.
   * Errors: `forbidden` if the same token means something else here.
   */
  adoptDevice({
    name,
    hash: tokenHash,
    expiresAt,
  }: {
    name: string;
    hash: string;
    expiresAt?: string;
  }): Uuid {
    const known = this.#store.credentials.getByHash('bearer', tokenHash);
    if (known) {
      if (known.revokedAt === undefined && known.scopes.join() === 'device') return known.id;
      throw new AppError('forbidden', 'The token of the device is revoked here, or has another use', {
        wanted: ['a token of a device'],
      });
    }
    const id = newId();
    this.#store.credentials.insert({
      id,
      name: `device ${name} ${id.slice(0, 8)}`,
      kind: 'bearer',
      hash: tokenHash,
      scopes: ['device'],
      createdAt: this.#time(0),
      ...(expiresAt === undefined ? {} : { expiresAt }),
    });
    return id;
  }

  /** What another cloudlet has to know of a device's token to let it in. */
  handOut(id: Uuid): { hash: string; expiresAt?: string } | undefined {
    const record = this.#store.credentials.get(id);
    if (!record || record.revokedAt !== undefined || record.kind !== 'bearer') return undefined;
    return { hash: record.hash, ...(record.expiresAt === undefined ? {} : { expiresAt: record.expiresAt }) };
  }

  /** Oldest first, revoked and expired ones among them. */
  list(request: PageRequest): Page<Credential> {
    const page = this.#store.credentials.list(request);
    return { ...page, items: page.items.map(withoutHash) };
  }

  /**
   * Refuses the credential from now on; again does no harm.
   * Errors: `not_found`, `in_use` if no other admin credential would be left.
   */
  revoke(id: Uuid): Credential {
    const record = this.#store.credentials.get(id);
    if (!record) throw new AppError('not_found', `There is no token ${id}.`, { kind: 'token', name: id });
    if (record.revokedAt !== undefined) return withoutHash(record);
    if (record.scopes.includes('admin') && !this.#hasOtherAdmin(id)) {
      const message = `Cannot revoke ${record.name}: it is the last admin credential.`;
      throw new AppError('in_use', message, { usedBy: ['the administration of this cloudlet'] });
    }
    const revoked = { ...record, revokedAt: this.#time(0) };
    this.#store.credentials.update(revoked);
    this.#cache.delete(cacheKey(record.kind, record.hash));
    return withoutHash(revoked);
  }

  #identify(bearer: string | undefined, certificate: X509Certificate | undefined): Principal | RefusalReason {
    if (bearer !== undefined) {
      return tokenPattern.test(bearer) ? this.#check('bearer', hash('sha256', bearer)) : 'unknown';
    }
    if (certificate === undefined) return 'missing';
    const cloudlet = this.#identifyCloudlet(certificate);
    if (typeof cloudlet === 'string') return cloudlet;
    if (cloudlet) return { kind: 'cloudlet', ...cloudlet, scopes: ['peer'] };
    const principal = this.#check('certificate', certificateFingerprint(certificate));
    // Registered or not, a certificate ends when it says so itself.
    return typeof principal === 'string' || isValidAt(certificate, this.#now()) ? principal : 'expired';
  }

  #check(kind: CredentialRecord['kind'], secretHash: string): Principal | RefusalReason {
    const entry = this.#find(kind, secretHash);
    if (!entry) return 'unknown';
    const { id, name, scopes, revokedAt, expiresAt } = entry.record;
    if (revokedAt !== undefined) return 'revoked';
    if (expiresAt !== undefined && Date.parse(expiresAt) <= this.#now()) return 'expired';
    this.#noteUse(entry);
    return { kind: 'credential', credentialId: id, name, scopes: expandScopes(scopes) };
  }

  #find(kind: CredentialRecord['kind'], secretHash: string): CacheEntry | undefined {
    const key = cacheKey(kind, secretHash);
    const cached = this.#cache.get(key);
    if (cached) return cached;
    // An unknown one is not cached: guesses must not push out those that are in use.
    const record = this.#store.credentials.getByHash(kind, secretHash);
    if (!record) return undefined;
    const lastUseWrittenMs = record.lastUsedAt === undefined ? 0 : Date.parse(record.lastUsedAt);
    const entry: CacheEntry = { record, lastUseWrittenMs };
    if (this.#cache.size >= CACHE_LIMIT) this.#cache.delete(this.#cache.keys().next().value!);
    this.#cache.set(key, entry);
    return entry;
  }

  #noteUse(entry: CacheEntry): void {
    const now = this.#now();
    if (now - entry.lastUseWrittenMs < LAST_USE_INTERVAL_MS) return;
    entry.lastUseWrittenMs = now;
    entry.record = { ...entry.record, lastUsedAt: this.#time(0) };
    try {
      this.#store.relaxed(() => this.#store.credentials.update(entry.record));
    } catch (error) {
      // A full disk must not lock out those who could make room.
      if (!(error instanceof AppError) || error.code !== 'insufficient_space') throw error;
    }
  }

  #hasOtherAdmin(id: Uuid): boolean {
    const now = this.#now();
    return this.#store.credentials
      .active()
      .some(
        (other) =>
          other.id !== id &&
          other.scopes.includes('admin') &&
          (other.expiresAt === undefined || Date.parse(other.expiresAt) > now),
      );
  }

  #time(fromNowMs: number): string {
    return new Date(this.#now() + fromNowMs).toISOString();
  }
}

export const expandScopes = (scopes: readonly CredentialScope[]): CredentialScope[] => [
  ...new Set(scopes.flatMap((scope) => included[scope])),
];

const cacheKey = (kind: string, secretHash: string): string => `${kind}:${secretHash}`;

/** Takes what openssl prints ("AA:BB:...") as well as plain hex. */
const normaliseFingerprint = (text: string): string => text.replaceAll(':', '').toLowerCase();

function withoutHash({ hash: secretHash, ...rest }: CredentialRecord): Credential {
  return rest.kind === 'certificate' ? { ...rest, certificateFingerprint: secretHash } : rest;
}

const isValidAt = (certificate: X509Certificate, timeMs: number): boolean =>
  certificate.validFromDate.getTime() <= timeMs && timeMs < certificate.validToDate.getTime();
