/** The OpenAPI 3.1 document of the contract. Pure: the same contract gives the same document. */
import type { TSchema } from 'typebox';
import { type ErrorCode, errorKinds } from '../model/errors.ts';
import { endpoints, type OperationName } from './endpoints.ts';
import { type Route, routes } from './routes.ts';
import * as schemas from './schemas.ts';

type Json = Record<string, unknown>;

const everyRoute: ErrorCode[] = ['invalid_request', 'internal'];
const everyAuthenticatedRoute: ErrorCode[] = ['unauthenticated', 'forbidden'];

const tags = {
  cloudlet: 'The cloudlet itself.',
  images: 'Disk images: immutable, named by the SHA-256 digest of the file, with aliases.',
  snapshots: 'Golden snapshots: an image plus the RAM of a VM just booted from it.',
  vms: 'Virtual machines.',
  migrations: 'VMs on their way between cloudlets.',
  following: 'Neighbours, devices, and where a VM should be: it follows its device.',
  operations: 'Long work: every 202 answers with an operation to watch.',
  tokens: 'Credentials: bearer tokens and client certificates.',
  fleet: 'The cloudlets that know each other.',
} satisfies Record<Route['tag'], string>;

/** All codes with which a route can refuse. */
export const errorsOf = (route: Route): ErrorCode[] => [
  ...everyRoute,
  ...(route.access === 'open' ? [] : everyAuthenticatedRoute),
  ...(route.body || route.binaryBody ? (['payload_too_large', 'unsupported_media_type'] as const) : []),
  ...route.errors,
];

/** The exported schemas by identity: a route that uses one refers to it by its name. */
const named = new Map<unknown, string>(
  Object.entries(schemas)
    .filter(([, value]) => typeof value === 'object' && 'type' in value)
    .map(([name, value]) => [value, name]),
);

/** The name of the schema among the components, if it has one; else the schema itself. */
function reference(schema: TSchema): Json {
  const name = named.get(schema);
  return name ? { $ref: `#/components/schemas/${name}` } : (schema as Json);
}

function parameters(schema: TSchema | undefined, place: 'path' | 'query'): Json[] {
  if (!schema) return [];
  const { properties, required = [] } = schema as {
    properties?: Record<string, TSchema>;
    required?: string[];
  };
  return Object.entries(properties ?? {}).map(([name, value]) => {
    const { description, ...rest } = value as Json & { description?: string };
    return {
      name,
      in: place,
      required: required.includes(name),
      ...(description ? { description } : {}),
      schema: rest,
    };
  });
}

function responses(route: Route): Json {
  const content = route.reply
    ? { 'application/json': { schema: reference(route.reply) } }
    : route.replyType
      ? { [route.replyType]: { schema: { type: 'string' } } }
      : undefined;
  const all: Json = {
    [route.status]: {
      description: route.status === 202 ? 'Accepted: watch the operation' : 'Done',
      ...(content ? { content } : {}),
    },
  };
  const byStatus = Map.groupBy(new Set(errorsOf(route)), (code) => errorKinds[code].status);
  for (const [status, codes] of byStatus) {
    all[status] = {
      description: codes.map((code) => `\`${code}\`: ${errorKinds[code].meaning}`).join('\n\n'),
      content: { 'application/json': { schema: { $ref: '#/components/schemas/ErrorReply' } } },
    };
  }
  return all;
}

function pathItem(name: OperationName, route: Route): Json {
  const body = route.body
    ? { 'application/json': { schema: reference(route.body) } }
    : route.binaryBody
      ? { 'application/octet-stream': { schema: { type: 'string', format: 'binary' } } }
      : undefined;
  return {
    operationId: name,
    summary: route.summary,
    description: route.access === 'open' ? 'Needs no credential.' : `Needs: ${route.access}.`,
    tags: [route.tag],
    parameters: [...parameters(route.params, 'path'), ...parameters(route.query, 'query')],
    ...(body ? { requestBody: { required: true, content: body } } : {}),
    responses: responses(route),
    ...(route.access === 'open' ? { security: [] } : {}),
  };
}

/** `serverUrl` is where the daemon that serves the document answers. */
export function openApiDocument(options: { version: string; serverUrl?: string }): Json {
  const paths: Record<string, Json> = {};
  for (const [name, route] of Object.entries(routes) as [OperationName, Route][]) {
    const { method, path } = endpoints[name];
    paths[path] = { ...paths[path], [method.toLowerCase()]: pathItem(name, route) };
  }
  return {
    openapi: '3.1.0',
    info: {
      title: 'Viper cloudlet',
      version: options.version,
      description:
        'Create, clone and run virtual machines on one cloudlet. Long work answers 202 with an operation; every ' +
        'refusal has a stable code. Sizes are bytes, times milliseconds, dates ISO 8601 in UTC.',
    },
    ...(options.serverUrl ? { servers: [{ url: options.serverUrl }] } : {}),
    tags: Object.entries(tags).map(([name, description]) => ({ name, description })),
    security: [{ bearer: [] }, { certificate: [] }],
    paths,
    components: {
      schemas: Object.fromEntries([...named].map(([schema, name]) => [name, schema])),
      securitySchemes: {
        bearer: { type: 'http', scheme: 'bearer' },
        certificate: {
          type: 'mutualTLS',
          description: 'A client certificate registered with POST /v1/tokens.',
        },
      },
    },
  };
}
