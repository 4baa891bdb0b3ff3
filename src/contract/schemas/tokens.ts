/** Credentials. */
import { Type } from 'typebox';
import { Body, Exact, Fingerprint, OneOf, Page, Time, Uuid } from './basics.ts';

export const Scope = OneOf(['admin', 'operate', 'read', 'device']);
export const CreateToken = Body(
  { name: 'reader', scopes: ['read'], expiresInS: 86_400 },
  {
    name: Type.String({ minLength: 1, maxLength: 100, pattern: '^[^\\u0000-\\u001f]*$' }),
    scopes: Type.Array(Scope, { minItems: 1, maxItems: 4, uniqueItems: true }),
    expiresInS: Type.Optional(Type.Integer({ minimum: 1, maximum: 10 * 366 * 24 * 3600 })),
    certificateFingerprint: Type.Optional(Fingerprint),
  },
);
export const Token = Exact({
  id: Uuid,
  name: Type.String(),
  kind: OneOf(['bearer', 'certificate']),
  scopes: Type.Array(Scope),
  createdAt: Time,
  expiresAt: Type.Optional(Time),
  revokedAt: Type.Optional(Time),
  lastUsedAt: Type.Optional(Time),
  certificateFingerprint: Type.Optional(Fingerprint),
});
export const TokenPage = Page(Token);
export const CreatedToken = Exact({
  token: Token,
  secret: Type.Optional(Type.String({ description: 'Shown this once. Absent for a certificate.' })),
});
