/**
 * Keeps the directories of a fleet alike without a leader: each cloudlet asks every peer that it knows for the peers
 * that this one knows, and tells all of itself when it is new or has changed.
 */
import { AppError, asAppError } from '../model/errors.ts';
import type { Peer } from '../model/fleet.ts';
import { isUuid, type Uuid } from '../model/ids.ts';
import type { PeerClient } from './peer-client.ts';
import { parsePeers } from './peer-entry.ts';
import { MAX_PEERS, type PeerDirectory } from './peers.ts';

export interface FleetCall {
  peers: PeerDirectory;
  client: Pick<PeerClient, 'fetch' | 'seen'>;
  signal?: AbortSignal | undefined;
  /** The cloudlet that holds the fleet's CA: what it has put out of the fleet is out of it. Ourselves if missing. */
  founderId?: Uuid | undefined;
  /** Peers asked at the same time. */
  parallel?: number;
  /** For all of it; who has not answered by then counts as failed. */
  deadlineMs?: number;
  now?: () => number;
}

export interface FleetCallOutcome {
  reached: Uuid[];
  failed: { id: Uuid; error: AppError }[];
}

/**
 * Asks every known peer for its peers and takes what is new. A peer that answers is fresh by its certificate and by
 * the address that it was found at. One failure does not hinder the others.
 */
export async function syncPeers(
  call: FleetCall,
): Promise<FleetCallOutcome & { learned: Peer[]; removed: Peer[] }> {
  const { peers, client, founderId, now = Date.now } = call;
  const heard: Peer[] = [];
  const putOut = new Set<Uuid>();
  const outcome = await callAll(call, async (peer, signal) => {
    const answer = (await client.fetch(peer, '/v1/peers', { signal })) as
      | { items?: unknown; removed?: unknown }
      | undefined;
    if (peer.id === founderId) for (const id of parseIds(answer?.removed)) putOut.add(id);
    const items = parsePeers(answer?.items);
    if (!items)
      throw new AppError('peer_unreachable', `${peer.url} answered with no list of peers.`, {
        url: peer.url,
      });
    // What a peer says of itself in passing counts no more than what others say of it.
    heard.push(...items, { ...peer, ...client.seen(peer.id), lastSeenAt: new Date(now()).toISOString() });
  });
  // First: what is out must not be learned from another member in the same breath.
  const removed = removeAll(peers, putOut, now());
  return { ...outcome, learned: peers.merge(heard, now()), removed };
}

/** Takes the founder's word on who is out; gives those that were in until now. */
function removeAll(peers: PeerDirectory, ids: Iterable<Uuid>, nowMs: number): Peer[] {
  const removed: Peer[] = [];
  for (const id of ids) if (peers.get(id)) removed.push(peers.remove(id, nowMs));
  return removed;
}

const parseIds = (list: unknown): Uuid[] =>
  Array.isArray(list)
    ? list.slice(0, 10 * MAX_PEERS).filter((id): id is Uuid => typeof id === 'string' && isUuid(id))
    : [];

/** Tells every peer that a cloudlet is out of the fleet; they believe it of the founder only. */
export async function announceRemoval(call: FleetCall & { removed: Uuid }): Promise<FleetCallOutcome> {
  const { client, removed } = call;
  return callAll(call, async (peer, signal) => {
    await client.fetch(peer, `/v1/fleet/members/${removed}`, { method: 'DELETE', signal });
  });
}

/**
 * Takes a removal that a caller announces; gives the cloudlet that was in until now.
 * Errors: `forbidden` unless the caller is the founder, who alone admits and puts out, or leaves itself.
 */
export function acceptRemoval(
  peers: PeerDirectory,
  caller: { cloudletId: Uuid },
  founderId: Uuid | undefined,
  removed: Uuid,
  nowMs = Date.now(),
): Peer | undefined {
  if (!peers.get(removed)) return undefined;
  if (caller.cloudletId === founderId || caller.cloudletId === removed)
    return removeAll(peers, [removed], nowMs)[0];
  const message = `Cloudlet ${caller.cloudletId} cannot put others out of the fleet: it has not founded it.`;
  throw new AppError('forbidden', message, { wanted: ['the founder of the fleet'] });
}

/** Tells every known peer of this cloudlet: after joining, and when its URL has changed. */
export async function announce(call: FleetCall & { self: Peer }): Promise<FleetCallOutcome> {
  const { client, self } = call;
  return callAll(call, async (peer, signal) => {
    await client.fetch(peer, '/v1/peers', { method: 'POST', json: self, signal });
  });
}

/**
 * Takes the announcement of a caller that has shown its certificate; false if that cloudlet is removed.
 * Errors: `forbidden` if it speaks for another one.
 */
export function acceptAnnouncement(
  peers: PeerDirectory,
  caller: { cloudletId: Uuid },
  said: Peer,
  nowMs = Date.now(),
): boolean {
  if (said.id !== caller.cloudletId) {
    const message = `Cloudlet ${caller.cloudletId} cannot speak for cloudlet ${said.id}.`;
    throw new AppError('forbidden', message, { wanted: ['the certificate of the cloudlet itself'] });
  }
  return peers.upsert({ ...said, lastSeenAt: new Date(nowMs).toISOString() });
}

async function callAll(
  { peers, signal, parallel = 8, deadlineMs = 30_000 }: FleetCall,
  ask: (peer: Peer, signal: AbortSignal) => Promise<void>,
): Promise<FleetCallOutcome> {
  const outcome: FleetCallOutcome = { reached: [], failed: [] };
  const deadline = AbortSignal.timeout(deadlineMs);
  const stop = signal ? AbortSignal.any([signal, deadline]) : deadline;
  const waiting = peers.list();
  const worker = async () => {
    for (let peer = waiting.shift(); peer; peer = waiting.shift()) {
      try {
        stop.throwIfAborted();
        await ask(peer, stop);
        outcome.reached.push(peer.id);
      } catch (error) {
        signal?.throwIfAborted();
        outcome.failed.push({
          id: peer.id,
          error: deadline.aborted ? late(peer, deadlineMs) : asAppError(error),
        });
      }
    }
  };
  await Promise.all(Array.from({ length: Math.min(parallel, waiting.length) }, worker));
  return outcome;
}

const late = ({ url }: Peer, deadlineMs: number): AppError =>
  new AppError('timeout', `${url} did not answer within the ${deadlineMs} ms for the whole fleet.`, { url });
