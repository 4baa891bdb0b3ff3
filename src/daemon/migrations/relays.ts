/** Which cloudlets may hold the memory of a VM that leaves, and its disk: those that lend room for that now. */
import type { Static } from 'typebox';
import type * as schemas from '../../contract/schemas.ts';
import type { Problem } from '../../migration/protocol.ts';
import type { Peer } from '../../model/fleet.ts';
import type { Uuid } from '../../model/ids.ts';
import type { RelayedOptions } from '../../model/migration.ts';
import type { Fleet } from '../fleet.ts';

export const defaultReplicas = 2;
const askTimeoutMs = 3000;
/** With less a relay is not worth its session. */
const leastFreeBytes = 16 * 1024 * 1024;
const leastDiskBytes = 64 * 1024 * 1024;
const roomFactor = 1.25;
const mostRelays = 32;

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
    diskBytes,
  }: {
    wanted: readonly Peer[] | undefined;
    destination: Peer;
    /** It has the key, so it must not have the pages as well. */
    custodian?: Peer | undefined;
    replicas: number;
    /** Of a disk that is not shared. */
    diskBytes?: number | undefined;
  },
): Promise<RelayChoice> {
  const others = [destination.id, custodian?.id];
  const asked = (wanted ?? fleet.peers()).filter(({ id }) => !others.includes(id));
  const answers = await Promise.all(
    asked.map(async (peer) => {
      const { freeBytes = 0, freeDiskBytes = 0 } = await lentBy(fleet, peer).catch(() => ({}) as Lent);
      return { peer, freeBytes, freeDiskBytes };
    }),
  );
  const relays = answers
    .filter(({ freeBytes }) => freeBytes >= leastFreeBytes)
    .toSorted((a, b) => b.freeBytes - a.freeBytes)
    .slice(0, mostRelays)
    .map(({ peer: { id, name } }) => ({ id, name }));
  const diskRelays =
    diskBytes === undefined
      ? undefined
      : relaysForDisk(
          answers.map(({ peer: { id, name }, freeDiskBytes }) => ({ id, name, freeBytes: freeDiskBytes })),
          { diskBytes, replicas },
        );
  const problems: Problem[] =
    relays.length >= replicas
      ? []
      : [
          {
            field: 'relays',
            value: relays.map(({ name }) => name).join(' '),
            wanted: `at least ${replicas} peers that lend memory`,
            message:
              `Of ${asked.length} peers ${relays.length} lend memory now${namesOf(relays)}, and each part is to be held by ` +
              `${replicas}. Others lend by \`viper relay on\`; destination and custodian cannot be relays`,
          },
        ];
  const kept = custodian && { custodian: { id: custodian.id, name: custodian.name } };
  return { relayed: { relays, replicas, ...kept, ...(diskRelays && { diskRelays }) }, problems };
}

/** For people: who holds what. */
export function describeRelays({ relays, replicas, custodian, diskRelays }: RelayedOptions): string {
  const names = relays.map(({ name }) => name).join(', ');
  return [
    `relays: ${names}, each part on ${replicas}`,
    ...(diskRelays ? ['its disk goes there, too'] : []),
    ...(custodian ? [`custodian: ${custodian.name}`] : []),
  ].join('; ');
}

/**
 * Those that hold the disk, if all of them together have room for as many copies as are wanted, each on another: what one
 * has beyond a whole copy is of no use. `undefined` if they do not: then the disk goes to the destination itself.
 */
export function relaysForDisk(
  offers: readonly { id: Uuid; name: string; freeBytes: number }[],
  { diskBytes, replicas }: { diskBytes: number; replicas: number },
): { id: Uuid; name: string }[] | undefined {
  // It is written while it leaves, and what a relay holds twice is not given back before the end.
  const copyBytes = Math.ceil(diskBytes * roomFactor) + leastDiskBytes;
  const relays = offers
    .filter(({ freeBytes }) => freeBytes >= leastDiskBytes)
    .toSorted((a, b) => b.freeBytes - a.freeBytes)
    .slice(0, mostRelays);
  const roomBytes = relays.reduce((sum, { freeBytes }) => sum + Math.min(freeBytes, copyBytes), 0);
  if (relays.length < replicas || roomBytes < replicas * copyBytes) return undefined;
  return relays.map(({ id, name }) => ({ id, name }));
}

const namesOf = (relays: readonly { name: string }[]): string =>
  relays.length === 0 ? '' : ` (${relays.map(({ name }) => name).join(', ')})`;

type Lent = Partial<Static<typeof schemas.Cloudlet>['relay']>;

/** What the peer would hold now. */
async function lentBy(fleet: Fleet, peer: Peer): Promise<Lent> {
  const answer = await fleet.client.fetch(peer, '/v1/cloudlet', { timeoutMs: askTimeoutMs });
  return (answer as Partial<Static<typeof schemas.Cloudlet>>).relay ?? {};
}

/** Of its memory, now. */
export async function lentBytesOf(fleet: Fleet, peer: Peer): Promise<number> {
  return (await lentBy(fleet, peer)).freeBytes ?? 0;
}
