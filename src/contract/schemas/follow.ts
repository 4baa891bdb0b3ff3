/** Following devices: neighbours, devices, decisions. */
import { Type } from 'typebox';
import { decisionOutcomes, triggerKinds } from '../../model/follow.ts';
import { Body, Bytes, Digest, Exact, Mac, Name, OneOf, Page, Time, Uuid } from './basics.ts';
import { Hardware, Seed, Tenant } from './vms.ts';

const Ms = Type.Number({ minimum: 0 });
const Address = Type.String({ pattern: '^[0-9a-fA-F:.]{2,39}$', description: 'IPv4 or IPv6.' });
const Lan = Type.String({
  pattern: '^\\d{1,3}(\\.\\d{1,3}){3}/\\d{1,2}$',
  description: 'Such as 10.4.0.0/24.',
});
const Named = Exact({ id: Uuid, name: Name });

// --- neighbours

export const Neighbour = Exact({
  cloudletId: Uuid,
  name: Name,
  url: Type.String(),
  standing: OneOf(
    ['neighbour', 'far', 'silent', 'unknown'],
    'A VM goes to a `neighbour` only: its RTT is acceptable, and it has answered of late.',
  ),
  rttMs: Type.Optional(Ms),
  jitterMs: Type.Optional(Ms),
  minMs: Type.Optional(Ms),
  lossRatio: Type.Number({ minimum: 0, maximum: 1 }),
  samples: Type.Integer(),
  bandwidthBps: Type.Optional(Type.Number({ description: 'Of past transfers to it.' })),
  lans: Type.Array(Lan),
  answeredAt: Type.Optional(Time),
});
export const NeighbourList = Exact({ acceptableMs: Ms, items: Type.Array(Neighbour) });

const Site = Exact({
  latitude: Type.Number({ minimum: -90, maximum: 90 }),
  longitude: Type.Number({ minimum: -180, maximum: 180 }),
  coverageM: Type.Number({ minimum: 0, maximum: 100_000, description: 'Reach of its radio.' }),
});
/** What two cloudlets tell each other before they measure. */
export const Greeting = Exact({
  lans: Type.Array(Lan, { maxItems: 100 }),
  site: Type.Optional(Site),
  wireguard: Type.Optional(
    Exact({
      publicKey: Type.String({ pattern: '^[A-Za-z0-9+/]{43}=$' }),
      host: Type.String({ pattern: '^[A-Za-z0-9.:-]{1,253}$' }),
      port: Type.Integer({ minimum: 1, maximum: 65_535 }),
      address: Type.Optional(Lan),
    }),
  ),
});
export const Greeted = Exact({
  ...Greeting.properties,
  echo: Type.Optional(
    Exact({
      port: Type.Integer({ minimum: 1, maximum: 65_535 }),
      key: Type.String({ pattern: '^[A-Za-z0-9_-]{43}$', description: 'Of this pair of cloudlets.' }),
    }),
  ),
});

// --- groups

export const Group = Exact({
  name: Type.String(),
  members: Type.Array(Named),
});
export const GroupList = Exact({ items: Type.Array(Group) });

// --- devices

export const Device = Exact({
  id: Uuid,
  name: Name,
  createdAt: Time,
  macs: Type.Array(Mac),
  addresses: Type.Array(Address),
  vm: Type.Optional(Named),
  vmIsHere: Type.Boolean(),
  vmAt: Type.Optional(Exact({ cloudletId: Uuid, name: Name, url: Type.String() })),
  rttMs: Type.Optional(Ms),
  lossRatio: Type.Optional(Type.Number()),
  lan: Type.Optional(Type.Union([Named, Type.Null()], { description: 'The cloudlet in whose LAN it is.' })),
  reportedAt: Type.Optional(Time),
});
export const DevicePage = Page(Device);
export const CreateDevice = Body(
  { name: 'phone', vm: 'web', addresses: ['10.4.0.2'] },
  {
    name: Name,
    macs: Type.Optional(Type.Array(Mac, { maxItems: 8 })),
    addresses: Type.Optional(Type.Array(Address, { maxItems: 8 })),
    vm: Type.Optional(Type.String({ maxLength: 128, description: 'Name or id of the VM that follows it.' })),
    expiresInS: Type.Optional(Type.Integer({ minimum: 1, maximum: 10 * 366 * 24 * 3600 })),
  },
);
export const CreatedDevice = Exact({
  device: Device,
  secret: Type.String({ description: 'Its bearer token, shown this once.' }),
});
export const PairDevice = Body({ vm: 'web' }, { vm: Type.String({ minLength: 1, maxLength: 128 }) });

/** What a device tells of itself. */
export const DeviceReport = Body(
  { addresses: ['10.5.0.8'], rtts: [] },
  {
    addresses: Type.Optional(Type.Array(Address, { maxItems: 8, description: 'The one in use first.' })),
    macs: Type.Optional(Type.Array(Mac, { maxItems: 8 })),
    rtts: Type.Optional(
      Type.Array(Exact({ cloudletId: Uuid, rttMs: Type.Number({ minimum: 0, maximum: 60_000 }) }), {
        maxItems: 100,
        description: 'To cloudlets, as the device measured them.',
      }),
    ),
  },
);
export const DeviceStatus = Exact({
  device: Device,
  cloudlet: Exact({ id: Uuid, name: Name, url: Type.String() }),
  neighbours: Type.Array(Exact({ id: Uuid, name: Name, url: Type.String() }), {
    description: 'Whose RTT the device should measure.',
  }),
  vmAddress: Type.Optional(Address),
});

/** One cloudlet gives a device over to the next, ahead of its VM. */
export const HandOver = Exact({
  name: Name,
  vmId: Uuid,
  macs: Type.Array(Mac, { maxItems: 8 }),
  addresses: Type.Array(Address, { maxItems: 8 }),
  createdAt: Time,
  credential: Exact({
    hash: Type.String({ pattern: '^[0-9a-f]{64}$', description: 'SHA-256 of the token.' }),
    expiresAt: Type.Optional(Time),
  }),
});

const { vmId: _, ...handedOver } = HandOver.properties;
/** A fresh VM for a device, in place of one that would come too slowly. */
export const FreshVm = Exact({
  name: Name,
  image: Digest,
  hardware: Hardware,
  seed: Seed,
  tenant: Type.Optional(Tenant),
  device: Exact({ id: Uuid, ...handedOver }),
});
export const StartedFreshVm = Exact({ vmId: Uuid });

/** Asked by the cloudlet that has the VM of a device. */
export const AskNearness = Exact({
  addresses: Type.Array(Address, { maxItems: 8 }),
  macs: Type.Array(Mac, { maxItems: 8 }),
  image: Type.Optional(Digest),
  deadlineMs: Type.Integer({ minimum: 50, maximum: 5000 }),
});
export const Nearness = Exact({
  rttMs: Type.Optional(Ms),
  address: Type.Optional(Address),
  seesDevice: Type.Boolean({ description: 'It is in a LAN of this cloudlet.' }),
  serviceInitiationMs: Type.Optional(Ms),
  load: Type.Optional(
    Exact({
      cpu: Type.Number({ minimum: 0, maximum: 1 }),
      memory: Type.Number({ minimum: 0, maximum: 1 }),
    }),
  ),
});

// --- decisions

const HandoffForecast = Exact({
  totalMs: Ms,
  downtimeMs: Ms,
  bytes: Bytes,
  deltaRttMs: Ms,
  serviceInitiationMs: Ms,
  learnedFrom: Type.Integer({ description: 'Past migrations that corrected the model.' }),
});
const Candidate = Exact({
  cloudletId: Uuid,
  name: Name,
  neighbourRttMs: Type.Optional(Ms),
  claimedRttMs: Type.Optional(Ms),
  reportedRttMs: Type.Optional(Ms),
  deviceRttMs: Type.Optional(Ms),
  seesDevice: Type.Boolean(),
  problems: Type.Array(Type.String()),
  forecast: Type.Optional(HandoffForecast),
  verdict: OneOf(['chosen', 'possible', 'excluded']),
  why: Type.String(),
});
export const Decision = Exact({
  id: Uuid,
  at: Time,
  vm: Named,
  device: Type.Optional(Named),
  trigger: Exact({ kind: OneOf(triggerKinds), message: Type.String() }),
  here: Exact({ cloudletId: Uuid, name: Name, deviceRttMs: Type.Optional(Ms) }),
  candidates: Type.Array(Candidate),
  outcome: OneOf(decisionOutcomes),
  target: Type.Optional(Named),
  reasons: Type.Array(Type.String()),
  policy: Exact({
    neighbourRttMs: Ms,
    improvementMs: Ms,
    improvementRatio: Type.Number(),
    crispRttMs: Ms,
    annoyingRttMs: Ms,
  }),
  tookMs: Ms,
  acted: Type.Boolean(),
  operationId: Type.Optional(Uuid),
  migrationId: Type.Optional(Uuid),
  result: Type.Optional(
    Exact({
      moved: Type.Boolean(),
      message: Type.String(),
      totalMs: Type.Optional(Ms),
      downtimeMs: Type.Optional(Ms),
    }),
  ),
});
export const DecisionPage = Page(Decision);

const Bps = Type.Number({ minimum: 0 });
/** One finished migration, as forecasts learn from it. */
export const ProfileSample = Exact({
  migrationId: Uuid,
  at: Time,
  peerId: Uuid,
  way: Type.String({ maxLength: 100 }),
  memoryBytes: Bytes,
  diskBytes: Bytes,
  dirtyBps: Bps,
  bandwidthBps: Bps,
  rttMs: Ms,
  modelTotalMs: Ms,
  modelDowntimeMs: Ms,
  totalMs: Ms,
  downtimeMs: Ms,
});
export const Profile = Exact({ items: Type.Array(ProfileSample, { maxItems: 1000 }) });
