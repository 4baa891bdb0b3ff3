/**
 * Viper as a library: open a cloudlet in your own program and call what the daemon calls. `viper/http` is its REST
 * API as a Fastify plugin, for a server of your own.
 */

export { createCloudlet, joinFleet } from '../fleet/index.ts';
export { AppError, type ErrorCode } from '../model/errors.ts';
export { Cloudlet, type OpenOptions } from './cloudlet.ts';
export type { Config } from './config.ts';
