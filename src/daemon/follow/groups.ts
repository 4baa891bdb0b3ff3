/** The VPN groups that the cloudlets of the fleet form by where they stand, and the tunnel of this one in each. */
import type { Static } from 'typebox';
import type * as schemas from '../../contract/schemas.ts';
import type { CloudletIdentity } from '../../fleet/index.ts';
import {
  formGroups,
  type Group,
  type Site,
  type WireguardSite,
  wireguardConfig,
} from '../../follow/index.ts';
import { AppError } from '../../model/errors.ts';
import type { Peer } from '../../model/fleet.ts';
import type { Uuid } from '../../model/ids.ts';
import type { FollowConfig } from './config.ts';
import type { Greeted } from './neighbours.ts';

export interface GroupsInput {
  identity: Pick<CloudletIdentity, 'id' | 'name' | 'joinedAt'>;
  config: FollowConfig;
  lans: string[];
  peers: { peer: Peer; greeted?: Greeted }[];
}

/**
 * The groups as the cloudlets came, so that each cloudlet computes the same ones: in the order in which they joined
 * the fleet. A cloudlet that does not say where it stands is in none.
 */
export function groupsOf({ identity, config, peers }: GroupsInput): Group[] {
  const own = { id: identity.id, joinedAt: identity.joinedAt, site: config.site };
  const others = peers.map(({ peer, greeted }) => ({
    id: peer.id,
    joinedAt: peer.joinedAt,
    site: greeted?.site,
  }));
  const sites = [own, ...others]
    .toSorted((a, b) => (`${a.joinedAt} ${a.id}` < `${b.joinedAt} ${b.id}` ? -1 : 1))
    .flatMap(({ id, site }): Site[] => (site ? [{ cloudletId: id, ...site }] : []));
  return formGroups(sites);
}

export function viewOfGroups(input: GroupsInput): Static<typeof schemas.GroupList> {
  const names = namesOf(input);
  const items = groupsOf(input).map(({ name, members }) => ({
    name,
    members: members.map((id) => ({ id, name: names.get(id) ?? id })),
  }));
  return { items };
}

/** Errors: `not_found` for a group that this cloudlet is not in, `unsupported` where something is not configured. */
export function wireguardOf(input: GroupsInput, name: string): string {
  const { identity, config, lans, peers } = input;
  const group = groupsOf(input).find((each) => each.name === name && each.members.includes(identity.id));
  if (!group) {
    throw new AppError('not_found', `This cloudlet is in no group '${name}'`, { kind: 'group', name });
  }
  const { wireguard } = config;
  if (!wireguard) {
    const message = 'No tunnel is configured here: config.json has no follow.wireguard';
    throw new AppError('unsupported', message, { missing: 'follow.wireguard' });
  }
  const names = namesOf(input);
  const sites = new Map<Uuid, WireguardSite>();
  const add = (
    id: Uuid,
    key: { publicKey: string; host: string; port: number },
    itsLans: readonly string[],
  ) =>
    sites.set(id, {
      cloudletId: id,
      name: names.get(id) ?? id,
      publicKey: key.publicKey,
      endpoint: { host: key.host, port: key.port },
      lans: itsLans,
    });
  add(identity.id, wireguard, lans);
  for (const { peer, greeted } of peers)
    if (greeted?.wireguard) add(peer.id, greeted.wireguard, greeted.lans);
  const { address, port: listenPort, privateKeyFile } = wireguard;
  try {
    return wireguardConfig(group, identity.id, sites, { address, listenPort, privateKeyFile }).text;
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
    throw new AppError('unsupported', error.message, { group: name }, { cause: error });
  }
}

const namesOf = ({ identity, peers }: GroupsInput): Map<Uuid, string> =>
  new Map([[identity.id, identity.name], ...peers.map(({ peer }) => [peer.id, peer.name] as const)]);
