/** What the fleet keeps, as it wants it: the daemon's store fits. */
import type { JoinTokenRecord, Peer } from '../model/fleet.ts';
import type { Uuid } from '../model/ids.ts';

export interface FleetState {
  joinTokens: {
    getByHash(secretHash: string): JoinTokenRecord | undefined;
    insert(token: JoinTokenRecord): void;
    /** False if it was used before. */
    use(id: Uuid, by: Uuid, at: string): boolean;
    deleteExpired(before: string): void;
  };
  peers: {
    all(): { peer: Peer; removed: boolean }[];
    put(peer: Peer): void;
    remove(id: Uuid, at: string): boolean;
  };
  transact<T>(work: () => T): T;
  afterCommit(run: () => void): void;
}
