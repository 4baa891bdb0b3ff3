/**
 * The shapes of the API, as JSON Schema with their TypeScript types: one file for each resource. The daemon validates
 * by them, the OpenAPI document shows each that is exported here by its name, the SDK is typed by them. Sizes are
 * bytes, times milliseconds, dates ISO 8601 in UTC.
 */
import type { Static, TSchema } from 'typebox';

export { BandwidthBps, Digest, ErrorReply, Name, PageQuery, Reference, Uuid } from './schemas/basics.ts';
export * from './schemas/cloudlet.ts';
export * from './schemas/fleet.ts';
export * from './schemas/follow.ts';
export * from './schemas/images.ts';
export * from './schemas/migrations.ts';
export * from './schemas/networks.ts';
export * from './schemas/operations.ts';
export * from './schemas/relay.ts';
export * from './schemas/snapshots.ts';
export * from './schemas/tokens.ts';
export * from './schemas/vms.ts';

export type Schema<T extends TSchema> = Static<T>;
