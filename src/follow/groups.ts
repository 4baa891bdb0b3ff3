/**
 * VPN groups of cloudlets within walking distance (thesis, 3.4.2): a cloudlet joins every group that has a member
 * near enough for a device to walk over before its MPTCP connection times out. It may be in several groups; groups
 * are never merged, as their address spaces are already given out. Pure.
 */
import type { Uuid } from '../model/ids.ts';

/** Retransmission timeout of MPTCP, at least 13 minutes, times the speed of a walker, 1.2 m/s (equation 3.6). */
export const walkM = 13 * 60 * 1.2;

export interface Site {
  cloudletId: Uuid;
  latitude: number;
  longitude: number;
  /** Reach of its radio from where it stands. */
  coverageM: number;
}

export interface Group {
  name: string;
  members: readonly Uuid[];
}

/** How far apart two cloudlets may be: the reach of both radios and the walk between them (equation 3.5). */
export const reachM = (a: Site, b: Site): number => a.coverageM + b.coverageM + walkM;

export const isInReach = (a: Site, b: Site): boolean => distanceM(a, b) <= reachM(a, b);

/**
 * The groups after a cloudlet has come: it is added to each one that has a member in reach; where there is none it
 * begins a group of its own, named by `nameOf`. One
 * that is in a group already stays where it is.
 */
export function addToGroups(
  groups: readonly Group[],
  site: Site,
  sites: ReadonlyMap<Uuid, Site>,
  nameOf = nextName,
): Group[] {
  if (groups.some(({ members }) => members.includes(site.cloudletId))) return [...groups];
  const isNear = (id: Uuid): boolean => sites.has(id) && isInReach(site, sites.get(id)!);
  const after = groups.map((group) =>
    group.members.some(isNear) ? { ...group, members: [...group.members, site.cloudletId] } : group,
  );
  const joined = after.some(({ members }) => members.includes(site.cloudletId));
  return joined ? after : [...after, { name: nameOf(groups), members: [site.cloudletId] }];
}

export interface Removal {
  groups: Group[];
  /** Groups whose remaining members are no longer all connected by steps in reach, with the parts. */
  split: { name: string; parts: Uuid[][] }[];
}

/** The groups without a cloudlet. What falls apart by that is told and stays one group: nobody is renumbered. */
export function removeFromGroups(
  groups: readonly Group[],
  cloudletId: Uuid,
  sites: ReadonlyMap<Uuid, Site>,
): Removal {
  const left: Group[] = [];
  const split: Removal['split'] = [];
  for (const group of groups) {
    const members = group.members.filter((id) => id !== cloudletId);
    if (members.length > 0) left.push({ ...group, members });
    if (members.length === group.members.length) continue;
    const parts = partsOf(members, sites);
    // One that was in parts before is not split by this removal.
    if (parts.length > partsOf(group.members, sites).length) split.push({ name: group.name, parts });
  }
  return { groups: left, split };
}

/** All cloudlets into groups, in the given order: the groups depend on who came first. */
export function formGroups(sites: readonly Site[]): Group[] {
  const known = new Map(sites.map((site) => [site.cloudletId, site]));
  return sites.reduce<Group[]>((groups, site) => addToGroups(groups, site, known), []);
}

/** Connected components of the members under "in reach". */
function partsOf(members: readonly Uuid[], sites: ReadonlyMap<Uuid, Site>): Uuid[][] {
  const left = new Set(members);
  const parts: Uuid[][] = [];
  for (const first of members) {
    if (!left.delete(first)) continue;
    const part = [first];
    for (const id of part) {
      for (const other of [...left]) {
        const [a, b] = [sites.get(id), sites.get(other)];
        if (!a || !b || !isInReach(a, b)) continue;
        left.delete(other);
        part.push(other);
      }
    }
    parts.push(part);
  }
  return parts;
}

const earthRadiusM = 6_371_000;
const radians = (degrees: number): number => (degrees * Math.PI) / 180;

/** Along the great circle (haversine). */
export function distanceM(a: Pick<Site, 'latitude' | 'longitude'>, b: typeof a): number {
  const dLatitude = radians(b.latitude - a.latitude);
  const dLongitude = radians(b.longitude - a.longitude);
  const h =
    Math.sin(dLatitude / 2) ** 2 +
    Math.cos(radians(a.latitude)) * Math.cos(radians(b.latitude)) * Math.sin(dLongitude / 2) ** 2;
  return 2 * earthRadiusM * Math.asin(Math.min(1, Math.sqrt(h)));
}

function nextName(groups: readonly Group[]): string {
  const used = new Set(groups.map(({ name }) => name));
  let number = 1;
  while (used.has(`vpn${number}`)) number += 1;
  return `vpn${number}`;
}
