/** What an operator may set about following devices: `follow` in config.json, every field of it optional. */
import { type Static, Type } from 'typebox';
import { defaultDecisionPolicy, defaultLoadPolicy, defaultTriggerPolicy } from '../../follow/index.ts';
import { migrationEngines, migrationModes } from '../../model/migration.ts';

const Exact = <T extends Parameters<typeof Type.Object>[0]>(properties: T) =>
  Type.Object(properties, { additionalProperties: false });
const Ms = Type.Optional(Type.Number({ minimum: 0, maximum: 86_400_000 }));
const Share = Type.Optional(Type.Number({ minimum: 0, maximum: 1 }));
const lan = '^\\d{1,3}(\\.\\d{1,3}){3}/\\d{1,2}$';

export const FollowConfigFile = Exact({
  /** `off`: nothing is decided; `tell`: decided and told by events; `act` (the default): done as well. */
  mode: Type.Optional(Type.Enum(['off', 'tell', 'act'])),
  rttThresholdMs: Ms,
  rttReleaseMs: Ms,
  sustainMs: Ms,
  lostAfterMs: Ms,
  cooldownMs: Ms,
  reconsiderMs: Ms,
  flapDwellMs: Ms,
  neighbourRttMs: Ms,
  improvementMs: Ms,
  improvementRatio: Share,
  crispRttMs: Ms,
  annoyingRttMs: Ms,
  /** Between two rounds of probes to the neighbours. */
  measureEveryMs: Type.Optional(Type.Integer({ minimum: 1000, maximum: 3_600_000 })),
  /** Between two probes to a device. */
  watchEveryMs: Type.Optional(Type.Integer({ minimum: 200, maximum: 60_000 })),
  /** `reports`: no pings, only what devices tell of themselves; where they never answer a ping. */
  deviceRtt: Type.Optional(Type.Enum(['ping', 'reports'])),
  /** Neighbours that have not told their RTT to the device by then are left out. */
  askDeadlineMs: Type.Optional(Type.Integer({ minimum: 100, maximum: 5000 })),
  /** Prefixes of the LANs here; by default those of the bridges. */
  lans: Type.Optional(Type.Array(Type.String({ pattern: lan }), { maxItems: 100 })),
  /** How a VM follows; what is missing is as for `viper vm migrate`. */
  migration: Type.Optional(
    Exact({
      mode: Type.Optional(Type.Enum([...migrationModes])),
      engine: Type.Optional(Type.Enum([...migrationEngines, 'auto'])),
      bandwidthBps: Type.Optional(Type.Integer({ minimum: 1_000_000, maximum: 1_000_000_000_000 })),
    }),
  ),
  /** `tell` (the default): a device is told that a fresh service would serve it better; `act`: it gets one. */
  freshService: Type.Optional(Type.Enum(['tell', 'act'])),
  load: Type.Optional(
    Exact({
      mode: Type.Optional(Type.Enum(['off', 'tell', 'act'])),
      cpuHigh: Share,
      cpuLow: Share,
      memoryHigh: Share,
      memoryLow: Share,
      sustainMs: Ms,
      cooldownMs: Ms,
    }),
  ),
  /** Where the cloudlet stands, for VPN groups. */
  site: Type.Optional(
    Exact({
      latitude: Type.Number({ minimum: -90, maximum: 90 }),
      longitude: Type.Number({ minimum: -180, maximum: 180 }),
      coverageM: Type.Number({ minimum: 0, maximum: 100_000 }),
    }),
  ),
  wireguard: Type.Optional(
    Exact({
      publicKey: Type.String({ pattern: '^[A-Za-z0-9+/]{43}=$' }),
      privateKeyFile: Type.String({ pattern: '^/[\\w./-]{1,200}$' }),
      host: Type.String({ pattern: '^[A-Za-z0-9.:-]{1,253}$' }),
      port: Type.Integer({ minimum: 1, maximum: 65_535 }),
      /** Of this cloudlet within the tunnel. */
      address: Type.String({ pattern: lan }),
    }),
  ),
});
type File = Static<typeof FollowConfigFile>;

export type FollowConfig = ReturnType<typeof followConfig>;

/** The settings over the defaults. */
export function followConfig(file: File = {}) {
  const { load, ...settings } = file;
  return {
    mode: 'act' as 'off' | 'tell' | 'act',
    measureEveryMs: 60_000,
    watchEveryMs: 500,
    askDeadlineMs: 600,
    deviceRtt: 'ping' as 'ping' | 'reports',
    migration: {} as NonNullable<File['migration']>,
    freshService: 'tell' as 'tell' | 'act',
    lans: undefined as string[] | undefined,
    site: undefined as File['site'],
    wireguard: undefined as File['wireguard'],
    ...defaultTriggerPolicy,
    ...defaultDecisionPolicy,
    ...settings,
    load: { mode: 'off' as 'off' | 'tell' | 'act', ...defaultLoadPolicy, ...load },
  };
}
