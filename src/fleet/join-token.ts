/**
 * The right to join: `vjt_<secret>.<fingerprint of the fleet's CA>`, both 32 bytes in base64url. The joiner knows by
 * the second part whom it may give the first part to, before it trusts anything that the network says.
 */
import { hash, randomBytes } from 'node:crypto';
import { AppError } from '../model/errors.ts';
import type { JoinTokenRecord } from '../model/fleet.ts';
import { newId } from '../model/ids.ts';
import type { FleetState } from './state.ts';

const tokenPattern = /^vjt_([A-Za-z0-9_-]{43})\.([A-Za-z0-9_-]{43})$/;
const MAX_LIFE_S = 30 * 24 * 3600;

export interface JoinTokenOptions {
  /** By default an hour, at most 30 days. */
  expiresInS?: number | undefined;
  now?: () => number;
}

/**
 * Makes a token that admits one cloudlet. Only its hash is kept.
 * Errors: `unsupported` at a cloudlet that has no CA key, `invalid_request` for a bad expiry.
 */
export function createJoinToken(
  state: Pick<FleetState, 'joinTokens' | 'transact'>,
  identity: { caFingerprint: string; caKey?: string },
  { expiresInS = 3600, now = Date.now }: JoinTokenOptions = {},
): { token: string; expiresAt: string } {
  requireCaKey(identity);
  if (!(expiresInS > 0 && expiresInS <= MAX_LIFE_S)) {
    throw new AppError(
      'invalid_request',
      `A join token cannot live ${expiresInS} s: wanted 1 to ${MAX_LIFE_S}.`,
      {
        problems: [{ field: 'expiresInS', value: expiresInS, wanted: `1 to ${MAX_LIFE_S}` }],
      },
    );
  }
  const secret = randomBytes(32).toString('base64url');
  const createdAt = new Date(now()).toISOString();
  const expiresAt = new Date(now() + expiresInS * 1000).toISOString();
  state.transact(() => {
    state.joinTokens.deleteExpired(new Date(now() - MAX_LIFE_S * 1000).toISOString());
    state.joinTokens.insert({ id: newId(), secretHash: hash('sha256', secret), createdAt, expiresAt });
  });
  const pin = Buffer.from(identity.caFingerprint, 'hex').toString('base64url');
  return { token: `vjt_${secret}.${pin}`, expiresAt };
}

/** The CA fingerprint that a token pins, lower-case hex. Errors: `invalid_request`. */
export function pinOf(token: string): string {
  return Buffer.from(parse(token).pin, 'base64url').toString('hex');
}

/** The record of a token that can be used now. Errors: `unauthenticated`, `invalid_request`. */
export function findJoinToken(
  state: Pick<FleetState, 'joinTokens'>,
  token: string,
  nowMs: number,
): JoinTokenRecord {
  const record = state.joinTokens.getByHash(hash('sha256', parse(token).secret));
  if (!record) throw new AppError('unauthenticated', 'The join token is not of this fleet.');
  if (record.usedAt !== undefined) throw usedBefore();
  if (Date.parse(record.expiresAt) > nowMs) return record;
  throw new AppError('unauthenticated', `The join token has expired at ${record.expiresAt}.`);
}

export const usedBefore = (): AppError =>
  new AppError('unauthenticated', 'The join token has been used: each admits one cloudlet.');

export function requireCaKey(identity: { caKey?: string }): asserts identity is { caKey: string } {
  if (identity.caKey !== undefined) return;
  const message =
    'This cloudlet does not have the key of the fleet CA: only the founder of the fleet admits members.';
  throw new AppError('unsupported', message, { missing: 'CA key' });
}

function parse(token: string): { secret: string; pin: string } {
  const match = tokenPattern.exec(token);
  if (match) return { secret: match[1]!, pin: match[2]! };
  throw new AppError('invalid_request', 'The join token is damaged: wanted vjt_SECRET.FINGERPRINT.', {
    problems: [{ field: 'token', wanted: 'vjt_ and two times 43 characters with a dot between' }],
  });
}
