/** Callers' credentials: hashes and facts, never a secret. */
import { AppError } from '../../model/errors.ts';
import type { Uuid } from '../../model/ids.ts';
import { type Database, type Statement, violatesUnique } from './database.ts';
import { type Page, type PageRequest, readPage } from './page.ts';

export const credentialScopes = ['admin', 'operate', 'read', 'device'] as const;
export type CredentialScope = (typeof credentialScopes)[number];

export interface CredentialRecord {
  id: Uuid;
  name: string;
  kind: 'bearer' | 'certificate';
  /** SHA-256 in lower-case hex: of the token's text, or of the certificate (its fingerprint). */
  hash: string;
  scopes: CredentialScope[];
  createdAt: string;
  expiresAt?: string;
  revokedAt?: string;
  lastUsedAt?: string;
}

interface Row {
  record: string;
}

export class CredentialRepository {
  readonly #byId: Statement<Row>;
  readonly #byHash: Statement<Row>;
  readonly #page: Statement<Row>;
  readonly #active: Statement<Row>;
  readonly #insert: Statement<never>;
  readonly #update: Statement<never>;

  constructor(database: Database) {
    this.#byId = database.prepare('SELECT record FROM credentials WHERE id = ?');
    this.#byHash = database.prepare('SELECT record FROM credentials WHERE kind = ? AND hash = ?');
    this.#page = database.prepare(
      'SELECT record FROM credentials WHERE (created_at, id) > (?, ?) ORDER BY created_at, id LIMIT ?',
    );
    this.#active = database.prepare('SELECT record FROM credentials WHERE revoked_at IS NULL');
    this.#insert = database.prepare(
      'INSERT INTO credentials (id, name, kind, hash, created_at, revoked_at, record) VALUES (?, ?, ?, ?, ?, ?, ?)',
    );
    this.#update = database.prepare('UPDATE credentials SET revoked_at = ?, record = ? WHERE id = ?');
  }

  get(id: Uuid): CredentialRecord | undefined {
    const row = this.#byId.get(id);
    return row && parse(row);
  }

  getByHash(kind: CredentialRecord['kind'], hash: string): CredentialRecord | undefined {
    const row = this.#byHash.get(kind, hash);
    return row && parse(row);
  }

  /** Oldest first, revoked ones among them. */
  list(request: PageRequest): Page<CredentialRecord> {
    return readPage(this.#page, request, positionOf, parse);
  }

  /** Those that are not revoked; some may have expired. */
  active(): CredentialRecord[] {
    return this.#active.all().map(parse);
  }

  /** Errors: `name_taken` if a credential that is not revoked has the name, or any has the certificate. */
  insert(credential: CredentialRecord): void {
    const { id, name, kind, hash, createdAt, revokedAt } = credential;
    try {
      this.#insert.run(id, name, kind, hash, createdAt, revokedAt ?? null, JSON.stringify(credential));
    } catch (error) {
      if (violatesUnique(error, 'credentials.name')) throw taken(`name ${name}`, name);
      if (violatesUnique(error, 'credentials.kind, credentials.hash')) throw taken('certificate', hash);
      throw error;
    }
  }

  /** Writes what may change: revocation, expiry and last use. */
  update(credential: CredentialRecord): void {
    this.#update.run(credential.revokedAt ?? null, JSON.stringify(credential), credential.id);
  }
}

const parse = (row: Row): CredentialRecord => JSON.parse(row.record) as CredentialRecord;

function positionOf(row: Row): [string, string] {
  const { createdAt, id } = parse(row);
  return [createdAt, id];
}

const taken = (what: string, name: string): AppError =>
  new AppError('name_taken', `Cannot add a credential: another one has the ${what}.`, {
    kind: 'token',
    name,
  });
