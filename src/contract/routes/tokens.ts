import type { OperationName } from '../endpoints.ts';
import * as schema from '../schemas.ts';
import { object, page, type Route } from './route.ts';

export const tokenRoutes = {
  listTokens: {
    summary: 'Credentials, oldest first; never their secrets',
    tag: 'tokens',
    access: 'admin',
    query: page,
    status: 200,
    reply: schema.TokenPage,
    errors: [],
  },
  createToken: {
    summary: 'Make a bearer token, or register a client certificate by its fingerprint',
    tag: 'tokens',
    access: 'admin',
    body: schema.CreateToken,
    status: 201,
    reply: schema.CreatedToken,
    errors: ['name_taken'],
  },
  revokeToken: {
    summary: 'Revoke a credential at once',
    tag: 'tokens',
    access: 'admin',
    params: object({ token: schema.Uuid }),
    status: 204,
    errors: ['not_found', 'in_use'],
  },
} as const satisfies Partial<Record<OperationName, Route>>;
