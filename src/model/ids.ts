/**
 * Identifiers. Everything that a cloudlet makes (VM, operation, token, snapshot, the cloudlet itself) is named
 * by a random UUID that never depends on an address; an image is named by the digest of its bytes.
 */
export type Uuid = string;
export type ImageDigest = string;

export const uuidPattern = '^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$';
export const digestPattern = '^sha256:[0-9a-f]{64}$';
/** A name that people choose: it is a valid host name label, so that it can name the guest as well. */
export const namePattern = '^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$';
export const macPattern = '^[0-9a-f]{2}(:[0-9a-f]{2}){5}$';

const uuid = new RegExp(uuidPattern);
const digest = new RegExp(digestPattern);

export const isUuid = (text: string): boolean => uuid.test(text);
export const isImageDigest = (text: string): boolean => digest.test(text);
export const newId = (): Uuid => globalThis.crypto.randomUUID();

/** A random locally administered unicast MAC address. */
export function newMac(): string {
  const bytes = globalThis.crypto.getRandomValues(new Uint8Array(5));
  return ['02', ...Array.from(bytes, (byte) => byte.toString(16).padStart(2, '0'))].join(':');
}
