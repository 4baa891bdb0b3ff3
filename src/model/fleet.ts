/** The fleet as one cloudlet sees it, as plain data. */
import type { Uuid } from './ids.ts';

/** Another cloudlet of the fleet. The id is what it is; name, URL and certificate may change. */
export interface Peer {
  id: Uuid;
  name: string;
  url: string;
  /** SHA-256 of its certificate, lower-case hex: to compare by hand. Trust comes from the fleet's CA. */
  certificateFingerprint: string;
  joinedAt: string;
  /** When some cloudlet of the fleet last spoke with it. */
  lastSeenAt?: string;
}

/** A right to join the fleet once. The secret itself is never stored. */
export interface JoinTokenRecord {
  id: Uuid;
  /** SHA-256 of the secret, lower-case hex. */
  secretHash: string;
  createdAt: string;
  expiresAt: string;
  usedAt?: string;
  /** The cloudlet that joined with it. */
  usedBy?: Uuid;
}
