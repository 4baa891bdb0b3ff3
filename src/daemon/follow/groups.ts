/** The VPN groups that the cloudlets of the fleet form by where they stand, and the tunnel of this one in each. */
import type { Static } from 'typebox';
import type * as schemas from '../../contract/schemas.ts';
import type { CloudletIdentity } from '../../fleet/index.ts';
import {
  formGroups,
  type Group,
  removeFromGroups,
  requireDistinctLans,
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
const groupsOf = (input: GroupsInput): Group[] => formGroups(placesOf(input));

/** Groups that fall apart when this peer leaves the fleet, with the names of the members of each part. */
export function splitsWithout(input: GroupsInput, peerId: Uuid): { group: string; parts: string[][] }[] {
  const names = namesOf(input);
  const places = new Map(placesOf(input).map((site) => [site.cloudletId, site]));
  return removeFromGroups(groupsOf(input), peerId, places).split.map(({ name, parts }) => ({
    group: name,
    parts: parts.map((part) => part.map((id) => names.get(id) ?? id)),
  }));
}

function placesOf({ identity, config, peers }: GroupsInput): Site[] {
  const own = { id: identity.id, joinedAt: identity.joinedAt, site: config.site };
  const others = peers.map(({ peer, greeted }) => ({
    id: peer.id,
    joinedAt: peer.joinedAt,
    site: greeted?.site,
  }));
  return [own, ...others]
    .toSorted((a, b) => (`${a.joinedAt} ${a.id}` < `${b.joinedAt} ${b.id}` ? -1 : 1))
    .flatMap(({ id, site }): Site[] => (site ? [{ cloudletId: id, ...site }] : []));
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
  const { identity, config } = input;
  const group = groupsOf(input).find((each) => each.name === name && each.members.includes(identity.id));
  if (!group) {
    throw new AppError('not_found', `This cloudlet is in no group '${name}'`, { kind: 'group', name });
  }
  const { wireguard } = config;
  if (!wireguard) {
    const message = 'No tunnel is configured here: config.json has no follow.wireguard';
    throw new AppError('unsupported', message, { missing: 'follow.wireguard' });
  }
  const sites = sitesOf(input);
  const { address, port: listenPort, privateKeyFile } = wireguard;
  try {
    return wireguardConfig(group, identity.id, sites, { address, listenPort, privateKeyFile }).text;
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
    throw new AppError('unsupported', error.message, { group: name }, { cause: error });
  }
}

/** The members of all groups of this cloudlet that have a tunnel, each once. Throws as `wireguardConfig` does. */
export function membersOf(input: GroupsInput): WireguardSite[] {
  const { id } = input.identity;
  const groups = groupsOf(input).filter(({ members }) => members.includes(id));
  const sites = sitesOf(input);
  const members = new Set(groups.flatMap((group) => group.members));
  const found = [...members].flatMap((each) => sites.get(each) ?? []);
  requireDistinctLans(found);
  return found.filter(({ cloudletId }) => cloudletId !== id);
}

/** Of those that have a tunnel. */
function sitesOf(input: GroupsInput): Map<Uuid, WireguardSite> {
  const { identity, config, lans, peers } = input;
  const names = namesOf(input);
  const own = { id: identity.id, key: config.wireguard, lans };
  const others = peers.map(({ peer, greeted }) => ({
    id: peer.id,
    key: greeted?.wireguard,
    lans: greeted?.lans ?? [],
  }));
  return new Map(
    [own, ...others].flatMap(({ id, key, lans: itsLans }) => {
      if (!key) return [];
      const { publicKey, host, port, address } = key;
      const site: WireguardSite = {
        cloudletId: id,
        name: names.get(id) ?? id,
        publicKey,
        endpoint: { host, port },
        ...(address === undefined ? {} : { address }),
        lans: itsLans,
      };
      return [[id, site] as const];
    }),
  );
}

const namesOf = ({ identity, peers }: GroupsInput): Map<Uuid, string> =>
  new Map([[identity.id, identity.name], ...peers.map(({ peer }) => [peer.id, peer.name] as const)]);
