/**
 * Where everything of a lab is: the names and the addresses of each part, computed from the spec, so that nothing
 * has to be looked up and a lab whose maker died can be found and taken away by name.
 *
 *   host ── core: bridge `mgmt` ── mgmt@c1, mgmt@c2 ...       198.18.X.0/24, the cloudlet N has .N, the host .254
 *   c1: wan-c2 ─── delay, rate, loss ─── wan-c1 :c2           100.64.K.0/30 for the link K
 *   c1: bridge lan0 ─ ap-phone ─── radio ─── wlan0 :phone     10.N.0.0/24: .1 the gateway, from .200 devices, else VMs
 *   phone: cell0 ─── cellular ─── d-phone :cell: n-c1 ─── cell :c1, c2 ...   100.66.D.0/30 and 100.65.N.0/30
 *
 * A cloudlet's daemon has one URL for all: 198.18.X.N is an address of the cloudlet, to which the host comes over the
 * management net, and other cloudlets and devices over the WAN. No route leads from cloudlet to cloudlet over `mgmt`.
 */
import type { LabSpec, WireSettings } from './spec.ts';

export const prefix = 'viper-';
export const lanBridge = 'lan0';
export const radioDevice = 'wlan0';
export const cellularDevice = 'cell0';
export const daemonPort = 7443;

export interface Site {
  name: string;
  /** From 1. */
  number: number;
  namespace: string;
  lan: string;
  gateway: string;
  gatewayMac: string;
  /** Of the daemon, from everywhere. */
  address: string;
  url: string;
}

export interface WireEnd {
  namespace: string;
  device: string;
}

/** A link whose delay, rate and loss are set; `ends` as it is made. */
export interface Wire {
  /** The names of its two places, with a hyphen. */
  name: string;
  places: readonly [string, string];
  ends: readonly [WireEnd, WireEnd];
  settings: WireSettings;
}

/** A link between two cloudlets, in the order of `wire.ends`. */
export interface WanLink {
  wire: Wire;
  sites: readonly [Site, Site];
  addresses: readonly [string, string];
}

export interface LabDevice {
  name: string;
  /** From 1. */
  number: number;
  namespace: string;
  mac: string;
  /** Its address in the LAN of that cloudlet. */
  addressAt: (site: Site) => string;
  at: Site;
  radio: Wire;
  cellular?: { wire: Wire; address: string; gateway: string };
}

export interface LabLayout {
  name: string;
  /** Of the host's own device on the management net, its only trace outside of namespaces. */
  hostDevice: string;
  hostAddress: string;
  core: string;
  cell: string;
  sites: Site[];
  links: WanLink[];
  devices: LabDevice[];
}

/** `subnet` of 198.18.0.0/15, from 0 to 511: what the management net is, as several labs may be up. */
export function layOut(spec: LabSpec, subnet: number): LabLayout {
  const namespace = (name: string) => namespaceOf(spec.name, name);
  const management = `198.${18 + Math.floor(subnet / 256)}.${subnet % 256}`;
  const sites = spec.cloudlets.map((name, index): Site => {
    const number = index + 1;
    const address = `${management}.${number}`;
    return {
      name,
      number,
      namespace: namespace(name),
      lan: `10.${number}.0.0/24`,
      gateway: `10.${number}.0.1`,
      gatewayMac: `02:00:0a:00:00:${hex(spec.gatewayMac === 'anycast' ? 1 : number)}`,
      address,
      url: `https://${address}:${daemonPort}`,
    };
  });
  const siteOf = (name: string) => sites.find((site) => site.name === name)!;
  return {
    name: spec.name,
    hostDevice: `${prefix}${spec.name}`,
    hostAddress: `${management}.254`,
    core: namespace('core'),
    cell: namespace('cell'),
    sites,
    links: pairs(sites, spec.topology).map(([a, b], index) => ({
      wire: {
        name: `${a.name}-${b.name}`,
        places: [a.name, b.name],
        ends: [
          { namespace: a.namespace, device: `wan-${b.name}` },
          { namespace: b.namespace, device: `wan-${a.name}` },
        ],
        settings: spec.wan,
      },
      sites: [a, b],
      addresses: [`100.64.${index}.1`, `100.64.${index}.2`],
    })),
    devices: spec.devices.map(({ name, at, cellular }, index): LabDevice => {
      const number = index + 1;
      return {
        name,
        number,
        namespace: namespace(name),
        mac: `02:00:0a:01:00:${hex(number)}`,
        // Even, as in the thesis, where the VM has the next odd one.
        addressAt: (site) => `10.${site.number}.0.${198 + 2 * number}`,
        at: siteOf(at),
        radio: {
          name: `${name}-radio`,
          places: [name, 'radio'],
          ends: [
            { namespace: namespace(name), device: radioDevice },
            { namespace: siteOf(at).namespace, device: accessPoint(name) },
          ],
          settings: spec.radio,
        },
        ...(cellular && {
          cellular: {
            wire: {
              name: `${name}-cellular`,
              places: [name, 'cellular'],
              ends: [
                { namespace: namespace(name), device: cellularDevice },
                { namespace: namespace('cell'), device: `d-${name}` },
              ],
              settings: cellular,
            },
            address: `100.66.${number}.2`,
            gateway: `100.66.${number}.1`,
          },
        }),
      };
    }),
  };
}

export const namespaceOf = (lab: string, name: string): string => `${prefix}${lab}-${name}`;

/** The cloudlet's end of a device's radio link. */
export const accessPoint = (device: string): string => `ap-${device}`;

export const wiresOf = ({ links, devices }: LabLayout): Wire[] => [
  ...links.map(({ wire }) => wire),
  ...devices.flatMap(({ radio, cellular }) => [radio, ...(cellular ? [cellular.wire] : [])]),
];

export const hasCellular = ({ devices }: LabLayout): boolean => devices.some(({ cellular }) => cellular);

function pairs(sites: Site[], topology: LabSpec['topology']): [Site, Site][] {
  return sites.flatMap((a, index) =>
    topology === 'star' && index > 0 ? [] : sites.slice(index + 1).map((b): [Site, Site] => [a, b]),
  );
}

const hex = (number: number): string => number.toString(16).padStart(2, '0');
