/**
 * One call of the API over `fetch`: builds the request from the endpoint table and turns whatever comes back
 * into the reply that the contract promises or a ViperError. Shapes inside a JSON reply are trusted: the
 * daemon validates them.
 */
import { endpoints, type OperationName } from '../contract/endpoints.ts';
import type { RouteReply } from '../contract/routes.ts';
import { errorFromReply, isObject, unreachable, ViperError } from './errors.ts';

export interface Connection {
  /** Without a slash at its end. */
  url: string;
  token: string | undefined;
  fetch: typeof fetch;
}

export interface RequestParts {
  params?: Record<string, string> | undefined;
  query?: Record<string, unknown> | undefined;
  /** A JSON body. */
  body?: unknown;
  /** Bytes as they are, instead of a JSON body. */
  bytes?: Blob | ReadableStream<Uint8Array>;
  headers?: Record<string, string>;
  signal?: AbortSignal | undefined;
}

/** The operations that answer with text; the compiler holds this against the contract. */
const textReplies: Record<TextOperation, true> = {
  getMetrics: true,
  getConsoleLog: true,
  getGroupConfig: true,
};
type TextOperation = {
  [K in OperationName]: unknown extends RouteReply<K> ? never : RouteReply<K> extends string ? K : never;
}[OperationName];

/** The reply's JSON or text; undefined where there is none. */
export async function call(
  connection: Connection,
  name: OperationName,
  parts: RequestParts,
): Promise<unknown> {
  const reply = await open(connection, name, parts);
  const text = await readText(reply, connection, name, parts.signal);
  if (name in textReplies) return text;
  if (reply.status === 204) return undefined;
  return parseJson(text, name, reply.status);
}

/** The reply with its body unread, if it is a good one; its refusal is thrown. */
export async function open(
  connection: Connection,
  name: OperationName,
  parts: RequestParts,
): Promise<Response> {
  const { method } = endpoints[name];
  const init: RequestInit & { duplex?: 'half' } = {
    method,
    headers: headersOf(connection, parts),
    // A token must not follow a redirect to somebody else; the API never redirects.
    redirect: 'error',
    ...(parts.signal ? { signal: parts.signal } : {}),
  };
  if (parts.bytes) {
    init.body = parts.bytes;
    init.duplex = 'half';
  } else if (parts.body !== undefined) {
    init.body = JSON.stringify(parts.body);
  }
  const address = connection.url + pathOf(name, parts);
  let reply: Response;
  try {
    reply = await connection.fetch(address, init);
  } catch (error) {
    parts.signal?.throwIfAborted();
    throw unreachable(name, connection.url, error);
  }
  if (reply.ok) return reply;
  throw errorFromReply(name, reply.status, await readText(reply, connection, name, parts.signal));
}

function headersOf(connection: Connection, parts: RequestParts): Record<string, string> {
  return {
    accept: 'application/json',
    ...(connection.token ? { authorization: `Bearer ${connection.token}` } : {}),
    ...(parts.body === undefined ? {} : { 'content-type': 'application/json' }),
    ...parts.headers,
  };
}

/** Path and query of an operation; a parameter can never leave its segment. */
export function pathOf(
  name: OperationName,
  { params, query }: Pick<RequestParts, 'params' | 'query'>,
): string {
  const path = endpoints[name].path.replace(/\{(\w+)\}/g, (_, key: string) => {
    const value = params?.[key];
    // `.` and `..` mean other paths to every URL parser, however they are encoded.
    if (typeof value !== 'string' || /^\.{0,2}$/.test(value)) {
      throw new ViperError(
        'invalid_request',
        `${name} needs the path parameter '${key}', and ${JSON.stringify(value) ?? 'nothing'} cannot be one`,
        { details: { problems: [{ field: `params.${key}`, value, wanted: 'a name or an id' }] } },
      );
    }
    return encodeURIComponent(value);
  });
  const search = new URLSearchParams();
  for (const [key, value] of Object.entries(query ?? {})) {
    if (value !== undefined) search.set(key, String(value));
  }
  return search.size > 0 ? `${path}?${search}` : path;
}

async function readText(
  reply: Response,
  connection: Connection,
  name: OperationName,
  signal: AbortSignal | undefined,
): Promise<string> {
  try {
    return await reply.text();
  } catch (error) {
    signal?.throwIfAborted();
    throw unreachable(name, connection.url, error);
  }
}

function parseJson(text: string, name: OperationName, status: number): unknown {
  try {
    const value: unknown = JSON.parse(text);
    if (isObject(value)) return value;
  } catch {
    // Told below, with the text.
  }
  throw new ViperError(
    'bad_reply',
    `${name} was answered with HTTP status ${status} and no JSON object: ${JSON.stringify(text.slice(0, 100))}. ` +
      'Does the URL lead to a Viper daemon?',
    { status },
  );
}
