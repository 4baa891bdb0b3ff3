/**
 * The contract: what goes into and comes out of every endpoint, who may call it and how it can be refused; one file
 * for each resource. The daemon registers its handlers against this table and nothing else answers; the OpenAPI
 * document and the types of the SDK are made from it.
 */
import type { Static, TSchema } from 'typebox';
import { endpoints, type OperationName } from './endpoints.ts';
import { cloudletRoutes } from './routes/cloudlet.ts';
import { fleetRoutes } from './routes/fleet.ts';
import { followRoutes } from './routes/follow.ts';
import { imageRoutes } from './routes/images.ts';
import { migrationRoutes } from './routes/migrations.ts';
import { operationRoutes } from './routes/operations.ts';
import type { Route } from './routes/route.ts';
import { snapshotRoutes } from './routes/snapshots.ts';
import { tokenRoutes } from './routes/tokens.ts';
import { vmRoutes } from './routes/vms.ts';

export type { Access, Route } from './routes/route.ts';

export const routes = {
  ...cloudletRoutes,
  ...imageRoutes,
  ...snapshotRoutes,
  ...vmRoutes,
  ...migrationRoutes,
  ...followRoutes,
  ...operationRoutes,
  ...tokenRoutes,
  ...fleetRoutes,
} as const satisfies Record<OperationName, Route>;

export type Routes = typeof routes;

type Part<R, K extends string> = R extends { [P in K]: infer S extends TSchema } ? Static<S> : undefined;
/** The parts of a request that an operation takes, for handlers and the SDK. */
export interface RouteInput<K extends OperationName> {
  params: Part<Routes[K], 'params'>;
  query: Part<Routes[K], 'query'>;
  body: Part<Routes[K], 'body'>;
}
export type RouteReply<K extends OperationName> = Routes[K] extends { reply: infer S extends TSchema }
  ? Static<S>
  : Routes[K] extends { replyType: 'text/plain' }
    ? string
    : undefined;

export { endpoints, type OperationName };
