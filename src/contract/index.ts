/** The REST contract as one import. */
export * from './endpoints.ts';
export { openApiDocument } from './openapi.ts';
export { type Access, type Route, type RouteInput, type RouteReply, type Routes, routes } from './routes.ts';
export * as schemas from './schemas.ts';
