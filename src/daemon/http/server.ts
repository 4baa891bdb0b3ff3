/**
 * The REST API of a cloudlet as a Fastify plugin: every endpoint of the contract with its handler, who may
 * call it and what it may carry. `serve` puts it behind TLS 1.3; a user's own Fastify can register it too.
 */
import type { Server } from 'node:tls';
import fastifyCors from '@fastify/cors';
import fastifyWebsocket from '@fastify/websocket';
import Fastify, {
  type FastifyInstance,
  type FastifyReply,
  type FastifyRequest,
  LogController,
} from 'fastify';
import { endpoints, type OperationName } from '../../contract/endpoints.ts';
import { type Route, type RouteInput, type RouteReply, routes } from '../../contract/routes.ts';
import { attachLink, serverAlpnProtocols } from '../../link/index.ts';
import { AppError } from '../../model/errors.ts';
import { newId } from '../../model/ids.ts';
import type { Cloudlet } from '../cloudlet.ts';
import type { Principal } from '../credentials.ts';
import { linkPurposes } from '../migrations/peer-side.ts';
import { authorize, callerOf } from './access.ts';
import { attachConsole } from './console.ts';
import { registerDocs } from './docs.ts';
import { answerClientError, answerError, answerExpectation, requireHost } from './errors.ts';
import { fleetHandlers } from './handlers/fleet.ts';
import { followHandlers } from './handlers/follow.ts';
import { imageHandlers } from './handlers/images.ts';
import { migrationHandlers } from './handlers/migrations.ts';
import { operationHandlers } from './handlers/operations.ts';
import { systemHandlers } from './handlers/system.ts';
import { vmHandlers } from './handlers/vms.ts';
import { compileFor, requireShallow } from './validation.ts';

/** What a handler is given: the parts of the request by the contract, who asks, and the raw pair if needed. */
export interface Call<K extends OperationName> extends RouteInput<K> {
  /** Undefined on an open route only. */
  caller: Principal | undefined;
  request: FastifyRequest;
  reply: FastifyReply;
}
/**
 * A handler parses nothing and decides nothing: it calls the domain and answers. A string goes out as it is, for
 * JSON that was made before; a handler that took over the raw reply (a stream) gives undefined.
 */
export type Handlers<K extends OperationName = OperationName> = {
  [P in K]: (
    call: Call<P>,
  ) => Promise<RouteReply<P> | string | undefined> | RouteReply<P> | string | undefined;
};
type AnyHandler = (call: unknown) => unknown;

const maxJsonBytes = 1024 * 1024;

/** `/v1/vms/{vm}` as Fastify writes it. */
const fastifyPath = (path: string): string => path.replace(/\{(\w+)\}/g, ':$1');

export async function viperHttp(app: FastifyInstance, options: { cloudlet: Cloudlet }): Promise<void> {
  const { cloudlet } = options;
  app.setValidatorCompiler(({ schema, httpPart }) => compileFor(httpPart, schema as object));
  // The contract's replies come from our own types; serialising by schema would only drop what a test must see.
  app.setSerializerCompiler(() => (value) => JSON.stringify(value));
  app.setErrorHandler(answerError);
  app.setNotFoundHandler((request) => {
    throw new AppError('not_found', `There is no ${request.method} ${request.url.split('?')[0]}`, {
      kind: 'route',
      name: `${request.method} ${request.url.split('?')[0]}`.slice(0, 200),
    });
  });
  if (cloudlet.config.corsOrigins.length > 0) {
    await app.register(fastifyCors, {
      origin: cloudlet.config.corsOrigins,
      methods: ['GET', 'POST', 'PUT', 'DELETE'],
      exposedHeaders: ['location'],
    });
  }
  await app.register(fastifyWebsocket, { options: { maxPayload: 64 * 1024 } });
  app.addHook('onRequest', async (request) => requireHost(request));
  app.addHook('onResponse', (request, reply, done) => {
    const route = request.routeOptions.url ?? 'none';
    cloudlet.metrics.observeRequest(request.method, route, reply.statusCode, reply.elapsedTime / 1000);
    done();
  });
  await registerDocs(app);

  const handlers: Handlers<Exclude<OperationName, 'attachConsole'>> = {
    ...systemHandlers(cloudlet),
    ...imageHandlers(cloudlet),
    ...vmHandlers(cloudlet),
    ...migrationHandlers(cloudlet),
    ...followHandlers(cloudlet),
    ...operationHandlers(cloudlet),
    ...fleetHandlers(cloudlet),
  };
  // Bodies of raw bytes go through unread, in a scope of their own: everywhere else they are refused.
  await app.register(async (binary) => {
    binary.removeAllContentTypeParsers();
    binary.addContentTypeParser('application/octet-stream', (_request, payload, done) => done(null, payload));
    for (const [name, route] of routesWhere((each) => each.binaryBody === true)) {
      addRoute(binary, cloudlet, name, route, handlers[name as keyof typeof handlers] as AnyHandler);
    }
  });
  for (const [name, route] of routesWhere((each) => !each.binaryBody && each.status !== 101)) {
    addRoute(app, cloudlet, name, route, handlers[name as keyof typeof handlers] as AnyHandler);
  }
  attachConsole(app, cloudlet);
}

const routesWhere = (choose: (route: Route) => boolean): [OperationName, Route][] =>
  (Object.entries(routes) as [OperationName, Route][]).filter(([, route]) => choose(route));

function addRoute(
  app: FastifyInstance,
  cloudlet: Cloudlet,
  name: OperationName,
  route: Route,
  handler: AnyHandler,
): void {
  const { method, path } = endpoints[name];
  app.route({
    method,
    url: fastifyPath(path),
    bodyLimit: maxJsonBytes,
    // A stream of events has no head that comes to an end.
    exposeHeadRoute: route.replyType !== 'text/event-stream',
    schema: {
      ...(route.params ? { params: route.params } : {}),
      ...(route.query ? { querystring: route.query } : {}),
      ...(route.body ? { body: route.body } : {}),
    },
    onRequest: (request, _reply, done) => {
      authorize(cloudlet, route.access, request);
      done();
    },
    preValidation: (request, _reply, done) => {
      // No body means an empty one, so that `curl -X POST …/stop` does what it says.
      if (route.body) {
        request.body ??= {};
        requireShallow(request.body);
      }
      done();
    },
    handler: async (request, reply) => {
      const answer = await handler({
        params: request.params,
        query: request.query,
        body: request.body,
        caller: callerOf(request),
        request,
        reply,
      });
      if (reply.sent) return reply;
      reply.code(route.status);
      if (route.status === 202) reply.header('location', `/v1/operations/${(answer as { id: string }).id}`);
      if (route.status === 204) return reply.send();
      reply.type(
        route.replyType === 'text/plain' ? 'text/plain; charset=utf-8' : 'application/json; charset=utf-8',
      );
      return reply.send(answer);
    },
  });
}

export interface Listening extends AsyncDisposable {
  url: string;
  app: FastifyInstance;
  close(): Promise<void>;
}

/** Serves the API on TLS 1.3 with the certificate of the cloudlet. */
export async function serve(cloudlet: Cloudlet, options: { host: string; port: number }): Promise<Listening> {
  const app = Fastify({
    loggerInstance: cloudlet.log,
    logController: new LogController({ disableRequestLogging: true }),
    genReqId: () => newId(),
    // A logger for each request would be made for the few that log; those say the request id themselves.
    childLoggerFactory: (logger) => logger,
    frameworkErrors: answerError,
    clientErrorHandler: answerClientError,
    requestTimeout: 0,
    forceCloseConnections: true,
    https: {
      ...cloudlet.identity.tls,
      minVersion: 'TLSv1.3',
      // The link between cloudlets uses the same port.
      ALPNProtocols: [...serverAlpnProtocols],
      // A client certificate is asked for and judged per request: most callers bring a token instead.
      requestCert: true,
      rejectUnauthorized: false,
      // Refused by us, in the one shape of errors.
      requireHostHeader: false,
    },
  });
  app.server.on('checkExpectation', answerExpectation);
  await app.register(viperHttp, { cloudlet });
  cloudlet.onRenewed(({ tls }) => app.server.setSecureContext({ ...tls, minVersion: 'TLSv1.3' }));
  await app.listen({ host: options.host, port: options.port }).catch((error) => {
    throw cannotListen(error, options);
  });
  const link = attachLink(app.server as Server, {
    identify: cloudlet.fleet.identify,
    accept: (request) => {
      if (request.purpose === linkPurposes.relay) return cloudlet.relay.accept(request);
      if (request.purpose === linkPurposes.escrow) return cloudlet.escrows.accept(request);
      return cloudlet.migrations.halves.acceptSession(request);
    },
  });
  const address = app.server.address();
  const port = typeof address === 'object' && address ? address.port : options.port;
  await cloudlet.follow.echo.listen({ host: options.host, port });
  const host = options.host.includes(':') ? `[${options.host}]` : options.host;
  const close = async () => {
    await link.close();
    await app.close();
  };
  return { url: `https://${host}:${port}`, app, close, [Symbol.asyncDispose]: close };
}

/** Of those by which the system refuses, what a person can do something about. */
const refusals: Record<string, string> = {
  EADDRINUSE: 'another program listens there',
  EADDRNOTAVAIL: 'this host has no such address',
  ENOTFOUND: 'there is no host of that name',
  EACCES: 'this user may not',
};

function cannotListen(error: NodeJS.ErrnoException, { host, port }: { host: string; port: number }): unknown {
  const why = refusals[error.code ?? ''];
  if (!why) return error;
  const message = `Cannot listen on ${host}:${port}: ${why}. Say another by --listen, or as "listen" in config.json`;
  return new AppError('invalid_request', message, { value: `${host}:${port}` }, { cause: error });
}
