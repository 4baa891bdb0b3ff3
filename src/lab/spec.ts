/** What a lab is made of, as somebody asks for it: parsed once, here; the other files trust it. */
import { AppError } from '../model/errors.ts';

/** How a link between two places behaves, the same in both directions. */
export interface WireSettings {
  /** Added to each round trip; half of it on each way. */
  rttMs: number;
  /** Each way; 0 is as fast as the machine. */
  rateBps: number;
  /** Of the packets of each way. */
  lossPercent: number;
  /** Every packet is lost, and neither end is told. */
  isCut: boolean;
}

export interface DeviceSpec {
  name: string;
  /** The cloudlet in whose LAN it starts. */
  at: string;
  /** A second path, to every cloudlet at once, which does not depend on where the device is. */
  cellular?: WireSettings;
}

export interface LabSpec {
  /** Of all that the lab makes on the machine. */
  name: string;
  cloudlets: string[];
  /** `mesh`: a WAN link between each two. `star`: the first cloudlet is in the middle and forwards. */
  topology: 'mesh' | 'star';
  wan: WireSettings;
  radio: WireSettings;
  devices: DeviceSpec[];
  /** `anycast`: the gateways of all LANs have one MAC, so that a VM that arrives need not learn another. */
  gatewayMac: 'anycast' | 'own';
}

export type LabWish = Partial<Omit<LabSpec, 'wan' | 'radio' | 'devices'>> & {
  wan?: Partial<WireSettings>;
  radio?: Partial<WireSettings>;
  devices?: { name: string; at?: string; cellular?: Partial<WireSettings> }[];
};

export const defaultLabName = 'lab';
const maxCloudlets = 16;
const maxDevices = 16;
/** It is part of device names, of which Linux takes 15 characters. */
const name = /^[a-z][a-z0-9]{0,7}$/;
/** Namespaces of the lab itself, and the words that stand for a device's two links. */
const taken = ['core', 'cell', 'radio', 'cellular', 'host'];

/** The setting of the thesis: 20 ms and 350 Mbit/s between cloudlets, 2 ms and 100 Mbit/s to a device. */
const wan: WireSettings = { rttMs: 20, rateBps: 350e6, lossPercent: 0, isCut: false };
const radio: WireSettings = { rttMs: 2, rateBps: 100e6, lossPercent: 0, isCut: false };
const cellular: WireSettings = { rttMs: 60, rateBps: 20e6, lossPercent: 0, isCut: false };

/** With what was left open filled in. Throws `invalid_request` that names the field, its value and what was wanted. */
export function parseLab(wish: LabWish = {}): LabSpec {
  const names = new Set<string>(taken);
  const newName = (field: string, value: string): string => {
    requireName(field, value);
    if (names.has(value)) throw refusal(field, value, `a name that is not in use: ${[...names].join(', ')}`);
    names.add(value);
    return value;
  };
  const cloudlets = (wish.cloudlets ?? ['c1', 'c2', 'c3']).map((each) => newName('cloudlets', each));
  if (cloudlets.length < 1 || cloudlets.length > maxCloudlets)
    throw refusal('cloudlets', cloudlets.length, `1 to ${maxCloudlets}`);
  const devices = (wish.devices ?? []).map((device): DeviceSpec => {
    const at = device.at ?? cloudlets[0]!;
    if (!cloudlets.includes(at)) throw refusal('devices.at', at, `one of ${cloudlets.join(', ')}`);
    const path = device.cellular && parseWire('devices.cellular', device.cellular, cellular);
    return { name: newName('devices.name', device.name), at, ...(path ? { cellular: path } : {}) };
  });
  if (devices.length > maxDevices) throw refusal('devices', devices.length, `at most ${maxDevices}`);
  return {
    name: requireName('name', wish.name ?? defaultLabName),
    cloudlets,
    topology: wish.topology ?? 'mesh',
    wan: parseWire('wan', wish.wan, wan),
    radio: parseWire('radio', wish.radio, radio),
    devices,
    gatewayMac: wish.gatewayMac ?? 'anycast',
  };
}

/** `wish` over `base`. Throws `invalid_request`. */
export function parseWire(field: string, wish: Partial<WireSettings> = {}, base = wan): WireSettings {
  const settings = { ...base, ...wish };
  const within = (key: 'rttMs' | 'rateBps' | 'lossPercent', min: number, max: number, wanted: string) => {
    const value = settings[key];
    if (!(value >= min && value <= max)) throw refusal(`${field}.${key}`, value, wanted);
  };
  within('rttMs', 0, 10_000, '0 to 10000 ms');
  within('lossPercent', 0, 100, '0 to 100 %');
  // Below, one packet of full size would hold the link up for longer than its queue is.
  if (settings.rateBps !== 0) within('rateBps', 200e3, 100e9, '0 (no limit) or 200 kbit/s to 100 Gbit/s');
  return settings;
}

/** A name of a lab, a cloudlet or a device. Throws `invalid_request`. */
export function requireName(field: string, value: string): string {
  if (name.test(value)) return value;
  throw refusal(field, value, 'a letter and up to 7 letters or digits, all lower case');
}

export function refusal(field: string, value: unknown, wanted: string): AppError {
  const shown = typeof value === 'string' ? `'${value}'` : String(value);
  return new AppError('invalid_request', `Lab: ${field} is ${shown}, wanted ${wanted}`, {
    problems: [{ field, value, wanted }],
  });
}
