/** Lists of peers as other cloudlets send them: checked entry by entry, bad ones dropped. */
import type { Peer } from '../model/fleet.ts';
import { isUuid } from '../model/ids.ts';
import { isCloudletName, normaliseCloudletUrl } from './address.ts';
import { MAX_PEERS } from './peers.ts';

const fingerprint = /^[0-9a-f]{64}$/;
const time = /^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}(\.\d{1,3})?Z$/;

/** The good ones among the first 1,000 entries of a list; undefined if it is no list. */
export function parsePeers(list: unknown): Peer[] | undefined {
  if (!Array.isArray(list)) return undefined;
  return list
    .slice(0, MAX_PEERS)
    .map(parsePeer)
    .filter((peer) => peer !== undefined);
}

export function parsePeer(value: unknown): Peer | undefined {
  if (typeof value !== 'object' || value === null) return undefined;
  const { id, name, url, certificateFingerprint, joinedAt, lastSeenAt } = value as Record<string, unknown>;
  const address = typeof url === 'string' ? normaliseCloudletUrl(url) : undefined;
  if (typeof id !== 'string' || !isUuid(id) || address === undefined) return undefined;
  if (typeof name !== 'string' || !isCloudletName(name)) return undefined;
  if (typeof certificateFingerprint !== 'string' || !fingerprint.test(certificateFingerprint))
    return undefined;
  if (!isTime(joinedAt) || !(lastSeenAt === undefined || isTime(lastSeenAt))) return undefined;
  const seen = lastSeenAt === undefined ? {} : { lastSeenAt };
  return { id, name, url: address, certificateFingerprint, joinedAt, ...seen };
}

const isTime = (value: unknown): value is string =>
  typeof value === 'string' && time.test(value) && !Number.isNaN(Date.parse(value));
