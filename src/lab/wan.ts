/** The cloudlets of a lab and what joins them, as commands: LANs, the management net, WAN links' addresses, routes. */
import type { Command } from '../network/index.ts';
import { hasCellular, type LabLayout, lanBridge, type Site, type WanLink } from './layout.ts';
import { inNamespace, planNamespace } from './namespaces.ts';

/** All namespaces but those of devices, with LANs and management net; no WAN yet. */
export function planSites(layout: LabLayout): Command[] {
  const { core, hostDevice, hostAddress, sites } = layout;
  return [
    ...planNamespace(core, { forwards: false }),
    inNamespace(core, ['ip', 'link', 'add', 'name', 'mgmt', 'type', 'bridge', 'stp_state', '0']),
    inNamespace(core, ['ip', 'link', 'set', 'dev', 'mgmt', 'up']),
    ['ip', 'link', 'add', 'name', hostDevice, 'type', 'veth', 'peer', 'name', 'host', 'netns', core],
    inNamespace(core, ['ip', 'link', 'set', 'dev', 'host', 'master', 'mgmt', 'up']),
    // A machine without IPv6 would not mind, one with it would give the device addresses of its own.
    ['ip', 'link', 'set', 'dev', hostDevice, 'addrgenmode', 'none'],
    ['ip', 'address', 'add', `${hostAddress}/24`, 'dev', hostDevice],
    ['ip', 'link', 'set', 'dev', hostDevice, 'up'],
    ...sites.flatMap((site) => planSite(layout, site)),
    ...(hasCellular(layout) ? planCell(layout) : []),
  ];
}

function planSite({ core, hostAddress }: LabLayout, site: Site): Command[] {
  const { namespace, name, gateway, gatewayMac, address } = site;
  const ip = (...args: string[]): Command => inNamespace(namespace, ['ip', ...args]);
  return [
    ...planNamespace(namespace, { forwards: true }),
    ip('link', 'add', 'name', lanBridge, 'type', 'bridge', 'stp_state', '0', 'forward_delay', '0'),
    ip('link', 'set', 'dev', lanBridge, 'address', gatewayMac, 'up'),
    ip('address', 'add', `${gateway}/24`, 'dev', lanBridge),
    ip('link', 'add', 'name', 'mgmt', 'type', 'veth', 'peer', 'name', `m-${name}`, 'netns', core),
    inNamespace(core, ['ip', 'link', 'set', 'dev', `m-${name}`, 'master', 'mgmt', 'up']),
    ip('address', 'add', `${address}/32`, 'dev', 'mgmt'),
    ip('link', 'set', 'dev', 'mgmt', 'up'),
    ip('route', 'add', `${hostAddress}/32`, 'dev', 'mgmt', 'src', address),
  ];
}

/** The network of the operator of the cellular links: a router with a path to every cloudlet. */
function planCell({ cell, sites }: LabLayout): Command[] {
  return [
    ...planNamespace(cell, { forwards: true }),
    ...sites.flatMap(({ namespace, name, number, lan, address }): Command[] => {
      const here = (...args: string[]): Command => inNamespace(cell, ['ip', ...args]);
      const there = (...args: string[]): Command => inNamespace(namespace, ['ip', ...args]);
      const net = `100.65.${number}`;
      return [
        here('link', 'add', 'name', `n-${name}`, 'type', 'veth', 'peer', 'name', 'cell', 'netns', namespace),
        here('address', 'add', `${net}.1/30`, 'dev', `n-${name}`),
        here('link', 'set', 'dev', `n-${name}`, 'up'),
        there('address', 'add', `${net}.2/30`, 'dev', 'cell'),
        there('link', 'set', 'dev', 'cell', 'up'),
        here('route', 'add', lan, 'via', `${net}.2`),
        here('route', 'add', `${address}/32`, 'via', `${net}.2`),
        there('route', 'add', '100.66.0.0/16', 'via', `${net}.1`, 'src', address),
      ];
    }),
  ];
}

/** Addresses of the WAN links and, at each cloudlet, the way to each other one. The links are there. */
export function planRoutes({ sites, links }: LabLayout): Command[] {
  return [
    ...links.flatMap(({ wire, addresses }) =>
      wire.ends.map(({ namespace, device }, index) =>
        inNamespace(namespace, ['ip', 'address', 'add', `${addresses[index]}/30`, 'dev', device]),
      ),
    ),
    ...sites.flatMap((site) =>
      [...nextHops(site, links)].flatMap(([{ lan, address }, nextHop]) =>
        // From the address that all others have a route to, and by which they know this cloudlet.
        [lan, `${address}/32`].map((to) =>
          inNamespace(site.namespace, ['ip', 'route', 'add', to, 'via', nextHop, 'src', site.address]),
        ),
      ),
    ),
  ];
}

/** By cloudlet, the neighbour's address on the way there with the fewest links. */
export function nextHops(from: Site, links: readonly WanLink[]): Map<Site, string> {
  const found = new Map<Site, string>();
  let edge: Site[] = [from];
  while (edge.length > 0) {
    const next: Site[] = [];
    for (const here of edge)
      for (const { sites, addresses } of links) {
        const side = sites.indexOf(here);
        const there = sites[1 - side];
        if (side < 0 || !there || there === from || found.has(there)) continue;
        found.set(there, found.get(here) ?? addresses[1 - side]!);
        next.push(there);
      }
    edge = next;
  }
  return found;
}
