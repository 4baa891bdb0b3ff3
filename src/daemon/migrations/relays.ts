/** Which cloudlets may hold the memory of a VM that leaves: those that lend some now. */
import type { Static } from 'typebox';
import type * as schemas from '../../contract/schemas.ts';
import type { Problem } from '../../migration/protocol.ts';
import type { Peer } from '../../model/fleet.ts';
import type { RelayedOptions } from '../../model/migration.ts';
import type { Fleet } from '../fleet.ts';

export const defaultReplicas = 2;
const askTimeoutMs = 3000;
/** With less a relay is not worth its session. */
const leastFreeBytes = 16 * 1024 * 1024;

export interface RelayChoice {
  relayed: RelayedOptions;
  /** Too few of them lend anything now. */
  problems: Problem[];
}

/** `wanted`: peers that the caller has named; all but the destination if there are none. */
export async function chooseRelays(
  fleet: Fleet,
  {
    wanted,
    destination,
    custodian,
    replicas,
  }: {
    wanted: readonly Peer[] | undefined;
    destination: Peer;
    /** It has the key, so it must not have the pages as well. */
    custodian?: Peer | undefined;
    replicas: number;
  },
): Promise<RelayChoice> {
  const others = [destination.id, custodian?.id];
  const asked = (wanted ?? fleet.peers()).filter(({ id }) => !others.includes(id));
  const answers = await Promise.all(
    asked.map(async (peer) => ({ peer, freeBytes: await lentBytesOf(fleet, peer).catch(() => 0) })),
  );
  const relays = answers
    .filter(({ freeBytes }) => freeBytes >= leastFreeBytes)
    .toSorted((a, b) => b.freeBytes - a.freeBytes)
    .slice(0, 32)
    .map(({ peer: { id, name } }) => ({ id, name }));
  const problems: Problem[] =
    relays.length >= replicas
      ? []
      : [
          {
            field: 'relays',
            value: relays.map(({ name }) => name).join(' '),
            wanted: `at least ${replicas} peers that lend memory`,
            message: `Of ${asked.length} peers ${relays.length} lend memory now, and each part is to be held by ${replicas}`,
          },
        ];
  const kept = custodian && { custodian: { id: custodian.id, name: custodian.name } };
  return { relayed: { relays, replicas, ...kept }, problems };
}

/** What the peer would hold now. */
export async function lentBytesOf(fleet: Fleet, peer: Peer): Promise<number> {
  const answer = await fleet.client.fetch(peer, '/v1/cloudlet', { timeoutMs: askTimeoutMs });
  return (answer as Partial<Static<typeof schemas.Cloudlet>>).relay?.freeBytes ?? 0;
}
