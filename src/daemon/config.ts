/**
 * What an operator sets: `config.json` in the state directory, all of it optional. Unknown or bad fields are
 * refused at start by name, before anything runs.
 */
import { readFile } from 'node:fs/promises';
import path from 'node:path';
import { Type } from 'typebox';
import { BandwidthBps, InstanceType as InstanceTypeSchema, Name } from '../contract/schemas.ts';
import { AppError } from '../model/errors.ts';
import { GiB, MiB } from '../model/units.ts';
import type { InstanceType, Storage } from '../model/vm.ts';
import { type CloudletNetwork, requireAddressPlan } from '../network/index.ts';
import { type FollowConfig, FollowConfigFile, followConfig } from './follow/config.ts';
import { compileFor, invalidRequest, problemsOf } from './http/validation.ts';

export const defaultListen = '127.0.0.1:7443';

export interface Config {
  /** HOST:PORT of the API. */
  listen: string;
  instanceTypes: InstanceType[];
  /** `user` is always among them. */
  networks: CloudletNetwork[];
  /** Where disks can be that other cloudlets have too. */
  storages: Storage[];
  /**
   * This cloudlet's address for tunnels that carry VMs' frames to other cloudlets: best that of a VPN, as tunnels do not
   * encrypt. The host of its URL if absent, when that is an IPv4 address.
   */
  tunnelAddress?: string;
  /** Origins of web pages that may call the API from a browser. */
  corsOrigins: string[];
  /** Defaults for what a caller leaves open; versioned and named, so that a VM can move. */
  machine: string;
  cpuModel: string;
  /** Free space that is never given away, for the host itself. */
  reserveBytes: number;
  /** The most bits per second that all migrations from here take together. */
  migrationBandwidthBps?: number;
  /** What may stay here of the memory of VMs that have left, encrypted; 0: nothing. */
  keptMemoryBytes: number;
  /** Memory that is lent to the migrations of others, unless an operator has said otherwise since; 0: none. */
  relayMemoryBytes: number;
  /** The same of disk space. */
  relayDiskBytes: number;
  /** How VMs follow their devices. */
  follow: FollowConfig;
}

const instance = (name: string, cpus: number, memoryBytes: number, diskBytes: number): InstanceType => ({
  name,
  cpus,
  memoryBytes,
  diskBytes,
  nets: ['user'],
});

export const defaultConfig: Config = {
  listen: defaultListen,
  instanceTypes: [
    instance('tiny', 1, 256 * MiB, GiB),
    instance('small', 1, 512 * MiB, 4 * GiB),
    instance('medium', 2, 1 * GiB, 10 * GiB),
    instance('large', 2, 2 * GiB, 20 * GiB),
    instance('xlarge', 4, 4 * GiB, 40 * GiB),
  ],
  networks: [{ name: 'user', kind: 'user' }],
  storages: [],
  corsOrigins: [],
  // The oldest supported QEMU knows it, so every supported host can take the VM.
  machine: 'pc-q35-7.2',
  // x86-64-v2 as a named model: every server of the last 15 years has it, and TCG can do all of it.
  cpuModel: 'Nehalem-v1',
  reserveBytes: 256 * MiB,
  keptMemoryBytes: 4 * GiB,
  relayMemoryBytes: 0,
  relayDiskBytes: 0,
  follow: followConfig(),
};

const Ipv4 = Type.String({ format: 'ipv4' });
const Addresses = Type.Object(
  {
    subnet: Type.String({ maxLength: 18 }),
    gateway: Ipv4,
    from: Ipv4,
    to: Ipv4,
    scheme: Type.Optional(Type.Union([Type.Literal('lowest'), Type.Literal('parity')])),
  },
  { additionalProperties: false },
);
const Bridge = Type.Object(
  {
    name: Name,
    kind: Type.Literal('bridge'),
    bridge: Type.String({ pattern: '^[a-zA-Z0-9_.-]{1,15}$' }),
    addresses: Type.Optional(Addresses),
  },
  { additionalProperties: false },
);
const DirectoryStorage = Type.Object(
  { name: Name, path: Type.String({ pattern: '^/', maxLength: 200 }) },
  { additionalProperties: false },
);
const ServerStorage = Type.Object(
  {
    name: Name,
    url: Type.String({
      pattern: '^(nfs://[^/\\s?#@]+|gluster://[^/\\s?#@]+/[^/\\s?#]+)(/[^\\s?#]*)?$',
      maxLength: 300,
    }),
  },
  { additionalProperties: false },
);
const ConfigFile = Type.Object(
  {
    listen: Type.Optional(Type.String()),
    instanceTypes: Type.Optional(Type.Array(InstanceTypeSchema, { maxItems: 100 })),
    networks: Type.Optional(Type.Array(Bridge, { maxItems: 100 })),
    storages: Type.Optional(Type.Array(Type.Union([DirectoryStorage, ServerStorage]), { maxItems: 100 })),
    tunnelAddress: Type.Optional(Ipv4),
    corsOrigins: Type.Optional(
      Type.Array(Type.String({ pattern: '^https?://[^/\\s]+$' }), { maxItems: 100 }),
    ),
    machine: Type.Optional(Type.String()),
    cpuModel: Type.Optional(Type.String()),
    reserveBytes: Type.Optional(Type.Integer({ minimum: 0 })),
    migrationBandwidthBps: Type.Optional(BandwidthBps),
    keptMemoryBytes: Type.Optional(Type.Integer({ minimum: 0 })),
    relayMemoryBytes: Type.Optional(Type.Integer({ minimum: 0 })),
    relayDiskBytes: Type.Optional(Type.Integer({ minimum: 0 })),
    follow: Type.Optional(FollowConfigFile),
  },
  { additionalProperties: false },
);
const validate = compileFor('body', ConfigFile);

/** The file's settings over the defaults; no file is fine. */
export async function loadConfig(directory: string): Promise<Config> {
  const file = path.join(directory, 'config.json');
  let text: string;
  try {
    text = await readFile(file, 'utf8');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return defaultConfig;
    throw error;
  }
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (cause) {
    throw new AppError('invalid_request', `${file} is not JSON`, { problems: [] }, { cause });
  }
  if (!validate(value)) throw invalidRequest(problemsOf(validate.errors ?? [], file));
  const settings = value as Partial<Config>;
  requireOwnNames(settings.storages ?? [], file);
  for (const network of settings.networks ?? [])
    if (network.kind === 'bridge' && network.addresses) requireAddressPlan(network.addresses);
  return {
    ...defaultConfig,
    ...settings,
    follow: followConfig(settings.follow),
    networks: [...defaultConfig.networks, ...(settings.networks ?? [])],
  };
}

/** Two storages of one name would be one to the other cloudlets. */
function requireOwnNames(storages: readonly Storage[], file: string): void {
  for (const [index, { name }] of storages.entries()) {
    if (storages.findIndex((other) => other.name === name) === index) continue;
    throw invalidRequest([
      { field: `${file}.storages.${index}.name`, value: name, wanted: 'a name of its own' },
    ]);
  }
}
