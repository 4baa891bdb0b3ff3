/**
 * The link: authenticated streams of bytes between two cloudlets that survive cuts of their connections. A daemon
 * attaches it to its server (`attachLink`) and opens sessions with peers (`openSession`).
 */
export { type AttachLinkOptions, attachLink, type Link } from './attach-link.ts';
export type { LinkCredentials } from './connect.ts';
export type { EarlyConnection } from './early-connection.ts';
export type { Identify } from './identify.ts';
export type { JsonObject } from './json.ts';
export { defaultLimits, type LinkLimits } from './limits.ts';
export { connectEarly, type OpenSessionOptions, openSession } from './open-session.ts';
export { type LinkPurpose, linkPurposes, serverAlpnProtocols } from './purposes.ts';
export { RateLimiter } from './rate-limiter.ts';
export { readInto } from './read-into.ts';
export type { SharedLimits } from './sender.ts';
export type { Session, SessionFacts, SessionStats } from './session.ts';
export type { AcceptedSession, AcceptSession, SessionRequest } from './session-table.ts';
