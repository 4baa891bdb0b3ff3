/**
 * The other cloudlets of the fleet, as this one knows them: in memory, written through to the store.
 *
 * Invariants: an id is there once and is never our own; a removed peer comes back only by being admitted again; what
 * peers tell of others is bounded and believed only where it is newer, since any member may be wrong or hostile. The
 * worst that a false entry does is a connection that fails, because a peer is recognised by its certificate.
 */
import { AppError } from '../model/errors.ts';
import type { Peer } from '../model/fleet.ts';
import type { Uuid } from '../model/ids.ts';
import type { FleetState } from './state.ts';

export const MAX_PEERS = 1000;

export class PeerDirectory {
  readonly #state: Pick<FleetState, 'peers' | 'transact' | 'afterCommit'>;
  readonly #ownId: Uuid;
  readonly #known = new Map<Uuid, Peer>();
  readonly #removed = new Set<Uuid>();

  constructor(state: Pick<FleetState, 'peers' | 'transact' | 'afterCommit'>, ownId: Uuid) {
    this.#state = state;
    this.#ownId = ownId;
    for (const { peer, removed } of state.peers.all()) {
      if (removed) this.#removed.add(peer.id);
      else this.#known.set(peer.id, peer);
    }
  }

  /** By name. */
  list(): Peer[] {
    return Array.from(this.#known.values()).sort((a, b) => (a.name < b.name ? -1 : a.name > b.name ? 1 : 0));
  }

  get(id: Uuid): Peer | undefined {
    return this.#known.get(id);
  }

  isRemoved(id: Uuid): boolean {
    return this.#removed.has(id);
  }

  /** Those that were put out, for others to learn of. */
  removed(): Uuid[] {
    return Array.from(this.#removed);
  }

  /** Admits a cloudlet, be it for the first time or again. Errors: `too_many`. */
  admit(peer: Peer): void {
    if (!this.#known.has(peer.id)) this.#requireRoom();
    this.#put(peer);
  }

  /**
   * Takes what a peer says of itself, or what we saw of it. False if the peer is removed or ourselves.
   * Errors: `too_many`.
   */
  upsert(peer: Peer): boolean {
    if (peer.id === this.#ownId || this.#removed.has(peer.id)) return false;
    this.admit({ ...peer, joinedAt: this.#known.get(peer.id)?.joinedAt ?? peer.joinedAt });
    return true;
  }

  /** Takes what others say of peers, where it is newer; gives those that it did not know before. */
  merge(heard: readonly Peer[], nowMs: number): Peer[] {
    const newest = new Map<Uuid, Peer>();
    for (const peer of heard) {
      if (peer.id === this.#ownId || this.#removed.has(peer.id)) continue;
      const entry = withPlausibleTime(peer, nowMs);
      const before = newest.get(peer.id) ?? this.#known.get(peer.id);
      if (before && !isNewer(entry, before)) continue;
      newest.set(peer.id, { ...entry, joinedAt: before?.joinedAt ?? entry.joinedAt });
    }
    const [changed, unknown] = partition(newest.values(), ({ id }) => this.#known.has(id));
    const learned = unknown.slice(0, MAX_PEERS - this.#known.size);
    this.#state.transact(() => {
      for (const peer of [...changed, ...learned]) this.#put(peer);
    });
    return learned;
  }

  /** Puts a cloudlet out of the fleet, as this one sees it: it is refused from now on. Errors: `not_found`. */
  remove(id: Uuid, nowMs: number): Peer {
    const peer = this.#known.get(id);
    if (!peer) throw new AppError('not_found', `There is no peer ${id}.`, { kind: 'peer', name: id });
    this.#state.peers.remove(id, new Date(nowMs).toISOString());
    this.#state.afterCommit(() => {
      this.#known.delete(id);
      this.#removed.add(id);
    });
    return peer;
  }

  #put(peer: Peer): void {
    this.#state.peers.put(peer);
    this.#state.afterCommit(() => {
      this.#known.set(peer.id, peer);
      this.#removed.delete(peer.id);
    });
  }

  #requireRoom(): void {
    if (this.#known.size < MAX_PEERS) return;
    throw new AppError('too_many', `Cannot add a peer: ${MAX_PEERS} are known.`, { limit: MAX_PEERS });
  }
}

const isNewer = (heard: Peer, known: Peer): boolean =>
  Date.parse(heard.lastSeenAt ?? heard.joinedAt) > Date.parse(known.lastSeenAt ?? known.joinedAt);

/** A time in the future would keep every later and true entry out. */
function withPlausibleTime(peer: Peer, nowMs: number): Peer {
  const { lastSeenAt = peer.joinedAt, ...rest } = peer;
  return { ...rest, lastSeenAt: new Date(Math.min(Date.parse(lastSeenAt), nowMs)).toISOString() };
}

function partition<T>(items: Iterable<T>, test: (item: T) => boolean): [yes: T[], no: T[]] {
  const yes: T[] = [];
  const no: T[] = [];
  for (const item of items) (test(item) ? yes : no).push(item);
  return [yes, no];
}
