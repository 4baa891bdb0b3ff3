/** What both sides of a change of network need of the daemon. */
import type { FastifyBaseLogger } from 'fastify';
import type { Static } from 'typebox';
import type * as schemas from '../../contract/schemas.ts';
import type { Uuid } from '../../model/ids.ts';
import type { Hop, Run } from '../../network/index.ts';
import type { EventLog } from '../events.ts';
import type { Store } from '../store/index.ts';
import type { Leases } from './leases.ts';

export type PrepareNetwork = Static<typeof schemas.PrepareNetwork>;
export type PreparedNetwork = Static<typeof schemas.PreparedNetwork>;

export interface HandoffParts {
  store: Store;
  leases: Leases;
  events: EventLog;
  log: FastifyBaseLogger;
  run: Run;
  /** After a change of what is in the store. */
  guard: () => Promise<void>;
  /** This cloudlet; `tunnelAddress` is missing where none is set. */
  self: () => { id: Uuid; name: string; tunnelAddress?: string };
  /** Of the network of that name. Errors: `unsupported`. */
  bridgeOf: (network: string) => string;
  /** The network that is on this bridge. */
  networkOf: (bridge: string) => string | undefined;
  /** The MAC of the bridge if it is the gateway of its LAN. */
  gatewayMacOf: (bridge: string, gateway: string) => Promise<string | undefined>;
  /** The first step of the way to that address. Errors: `unsupported` where there is none. */
  hopTo: (address: string) => Promise<Hop>;
  /** Resolves when nothing of the VM's last arrival here is left to do. */
  settled: (vmId: Uuid) => Promise<void>;
  /** Asks a peer to prepare. Errors: as the peer answers, and `peer_unreachable`. */
  ask: (
    peerId: Uuid,
    migrationId: Uuid,
    question: Omit<PrepareNetwork, 'tunnel'> & { tunnel?: PrepareNetwork['tunnel'] | undefined },
    signal: AbortSignal,
  ) => Promise<PreparedNetwork>;
  giveBack: (peerId: Uuid, migrationId: Uuid) => Promise<void>;
  /** Tells a peer that the VM stands still. */
  tellTurn: (peerId: Uuid, migrationId: Uuid) => Promise<void>;
}
