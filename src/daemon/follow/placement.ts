/**
 * Where a VM should be: gathers what `follow/decide.ts` decides from. All neighbours are asked at once for their RTT
 * to the device, with a deadline; those nearest are then asked whether the VM fits, and each gets a forecast.
 */
import type { Static } from 'typebox';
import * as schemas from '../../contract/schemas.ts';
import type { CloudletIdentity } from '../../fleet/index.ts';
import {
  type CandidateInput,
  decide,
  decideByLoad,
  judge,
  judgeLoad,
  type Load,
} from '../../follow/index.ts';
import { AppError, asAppError } from '../../model/errors.ts';
import type { Decision, DeviceRecord, HandoffForecast, RttStats, Trigger } from '../../model/follow.ts';
import { newId, type Uuid } from '../../model/ids.ts';
import { withDeadline } from '../../qmp/index.ts';
import type { Fleet } from '../fleet.ts';
import { compileFor } from '../http/validation.ts';
import { forecast } from '../migrations/forecast.ts';
import type { MigrationService } from '../migrations/service.ts';
import type { Managed } from '../vms/registry.ts';
import type { FollowConfig } from './config.ts';
import type { AskNearness, Nearness } from './nearness.ts';
import type { Neighbours } from './neighbours.ts';
import { pingBriefly } from './ping.ts';
import type { Profiles } from './profiles.ts';

const isNearness = compileFor('body', schemas.Nearness);
/** The nearest ones, which are asked whether the VM fits. */
const forecasts = 3;
/** For a neighbour to say whether the VM fits, beyond the deadline of its round trip: it looks at its disks for that. */
const fitMs = 2000;
/** Statistics older than this say nothing about now. */
const rttFreshMs = 2000;
/** Until a cloudlet has measured its own. */
const assumedServiceInitiationMs = 30_000;

export interface PlacementOptions {
  identity: () => CloudletIdentity;
  config: FollowConfig;
  fleet: Fleet;
  neighbours: Neighbours;
  profiles: Profiles;
  migrations: MigrationService;
  dirtyBpsOf: (vmId: Uuid) => number;
}

/** What the watch of a device knows of it; a device of a VM that is not running has none. */
export interface Observed {
  rtt: RttStats;
  reported: Map<Uuid, number>;
}

/** A decision, and the address at which some cloudlet sees the device in its LAN. */
export interface Placed {
  decision: Decision;
  sightedAt?: string;
}

/** What is known of a peer, and what it added to its answer. */
type Asked = CandidateInput & { serviceInitiationMs?: number; address?: string; load?: Load };

export type MigrateRequest = Static<typeof schemas.MigrateVm>;

export class Placement {
  readonly #options: PlacementOptions;

  constructor(options: PlacementOptions) {
    this.#options = options;
  }

  /** Decides and does nothing. `observed` is missing where nobody watches the device. */
  async decide(
    managed: Managed,
    device: DeviceRecord | undefined,
    trigger: Trigger,
    observed?: Observed,
  ): Promise<Placed> {
    const { identity, config } = this.#options;
    const begun = performance.now();
    const { id, name, spec } = managed.record;
    const [hereRttMs, candidates] = await Promise.all([
      device && this.#rttFromHere(device, observed),
      this.#candidates(device, spec.disk.image, observed),
    ]);
    const promising = candidates
      .map((input) => ({ input, judged: judge(input, hereRttMs, config) }))
      .filter(({ judged }) => judged.verdict === 'possible')
      .toSorted((a, b) => a.judged.deviceRttMs! - b.judged.deviceRttMs!)
      .slice(0, forecasts);
    await Promise.all(promising.map(({ input }) => this.#forecast(managed, input)));
    const verdict = device
      ? decide({ trigger, hereRttMs, candidates }, config)
      : { candidates: [], outcome: 'stay' as const, reasons: ['No device is paired with the VM'] };
    const { neighbourRttMs, improvementMs, improvementRatio, crispRttMs, annoyingRttMs } = config;
    const sighted = candidates.find(({ seesDevice, address }) => seesDevice && address !== undefined);
    const decision: Decision = {
      id: newId(),
      at: new Date().toISOString(),
      vm: { id, name },
      ...(device ? { device: { id: device.id, name: device.name } } : {}),
      trigger: { kind: trigger.kind, message: trigger.message },
      here: {
        cloudletId: identity().id,
        name: identity().name,
        ...(hereRttMs === undefined ? {} : { deviceRttMs: hereRttMs }),
      },
      ...verdict,
      policy: { neighbourRttMs, improvementMs, improvementRatio, crispRttMs, annoyingRttMs },
      tookMs: Math.round(performance.now() - begun),
      acted: false,
    };
    return { decision, ...(sighted?.address === undefined ? {} : { sightedAt: sighted.address }) };
  }

  /** Where a VM goes that has to leave for the sake of load. */
  async decideByLoad(managed: Managed, trigger: Trigger): Promise<Decision> {
    const { identity, config } = this.#options;
    const begun = performance.now();
    const nowhere = { addresses: [], macs: [] };
    const candidates = await this.#candidates(nowhere, managed.record.spec.disk.image, undefined);
    const promising = candidates.filter((each) => judgeLoad(each, config.load).verdict === 'possible');
    await Promise.all(promising.slice(0, forecasts).map((input) => this.#forecast(managed, input)));
    const asked = candidates.filter((each) => !promising.slice(forecasts).includes(each));
    const { neighbourRttMs, improvementMs, improvementRatio, crispRttMs, annoyingRttMs } = config;
    return {
      id: newId(),
      at: new Date().toISOString(),
      vm: { id: managed.record.id, name: managed.record.name },
      trigger,
      here: { cloudletId: identity().id, name: identity().name },
      ...decideByLoad(trigger, asked, config.load),
      policy: { neighbourRttMs, improvementMs, improvementRatio, crispRttMs, annoyingRttMs },
      tookMs: Math.round(performance.now() - begun),
      acted: false,
    };
  }

  /** The RTT of each peer to a device, in ms, of those that answer in time. */
  async nearness(device: DeviceRecord): Promise<Map<Uuid, number>> {
    const candidates = await this.#candidates(device, undefined, undefined);
    return new Map(
      candidates.flatMap(({ cloudletId, claimedRttMs }) =>
        claimedRttMs === undefined ? [] : [[cloudletId, claimedRttMs] as const],
      ),
    );
  }

  async #rttFromHere(
    { addresses }: DeviceRecord,
    observed: Observed | undefined,
  ): Promise<number | undefined> {
    const { config, identity } = this.#options;
    const { rtt, reported } = observed ?? {};
    if (rtt && rtt.samples >= 3 && Date.now() - rtt.answeredAtMs < rttFreshMs) return rtt.smoothedMs;
    const signal = AbortSignal.timeout(config.askDeadlineMs);
    const [address] = config.deviceRtt === 'ping' ? addresses : [];
    const measured = address === undefined ? undefined : await pingBriefly(address, signal);
    return measured ?? reported?.get(identity().id);
  }

  async #candidates(
    device: Pick<DeviceRecord, 'addresses' | 'macs'> | undefined,
    image: string | undefined,
    observed: Observed | undefined,
  ): Promise<Asked[]> {
    return Promise.all(
      this.#options.neighbours.all().map(async ({ peer, neighbour, standing }) => {
        const answer =
          device && standing === 'neighbour'
            ? await this.#ask(peer, device, image).catch(() => undefined)
            : undefined;
        const { samples, smoothedMs } = neighbour.rtt;
        return {
          cloudletId: peer.id,
          name: peer.name,
          standing,
          ...(samples > 0 ? { neighbourRttMs: smoothedMs } : {}),
          claimedRttMs: answer?.rttMs,
          reportedRttMs: observed?.reported.get(peer.id),
          seesDevice: answer?.seesDevice,
          problems: [],
          ...(answer?.load ? { load: answer.load } : {}),
          ...(answer?.address === undefined ? {} : { address: answer.address }),
          ...(answer?.serviceInitiationMs === undefined
            ? {}
            : { serviceInitiationMs: answer.serviceInitiationMs }),
        };
      }),
    );
  }

  async #ask(
    peer: { id: Uuid; url: string },
    { addresses, macs }: Pick<DeviceRecord, 'addresses' | 'macs'>,
    image: string | undefined,
  ): Promise<Nearness | undefined> {
    const { fleet, config } = this.#options;
    const deadlineMs = config.askDeadlineMs;
    const body: AskNearness = { addresses, macs, deadlineMs, ...(image ? { image } : {}) };
    const init = { method: 'POST' as const, json: body, timeoutMs: deadlineMs + 400 };
    const answer = await fleet.client.fetch(peer, '/v1/nearness', init);
    return isNearness(answer) ? (answer as Nearness) : undefined;
  }

  /** Adds to a candidate whether the VM fits there, and what going there would cost. */
  async #forecast(managed: Managed, input: Asked): Promise<void> {
    const { migrations, profiles, neighbours, dirtyBpsOf, config } = this.#options;
    try {
      const asked = migrations.check(managed.record.id, this.requestFor(input.cloudletId));
      const timeoutMs = config.askDeadlineMs + fitMs;
      const message = `${input.name} did not say in time if it has room`;
      const onTimeout = () => new AppError('timeout', message, { timeoutMs });
      const check = await withDeadline(asked, { timeoutMs, onTimeout });
      const { vm, options, peer, problems, hasImage } = check;
      input.problems = problems.map(({ message }) => message);
      const neighbour = neighbours.get(peer.id);
      const rttMs = neighbour?.rtt.smoothedMs ?? check.rttMs;
      const linkBps = neighbour?.bandwidthBps ?? check.linkBps;
      const dirtyBps = dirtyBpsOf(vm.id);
      const model = forecast({ vm, options, dirtyBps, linkBps, rttMs, sendsImage: !hasImage });
      // A fresh service needs the image there, too.
      const imageMs = hasImage ? 0 : (vm.image.fileBytes * 8000) / model.inputs.bandwidthBps!;
      const serviceInitiationMs = Math.round(
        (input.serviceInitiationMs ?? assumedServiceInitiationMs) + imageMs,
      );
      const known: HandoffForecast = profiles.handoff(
        model,
        { vm, options, peer, hasImage },
        { neighbourRttMs: rttMs, serviceInitiationMs },
      );
      input.forecast = { ...known, bytes: Math.round(known.bytes) };
    } catch (error) {
      input.problems = [asAppError(error).message];
    }
  }

  /** The migration that a decision asks for; `deviceAddress` is that of the device in the LAN there. */
  requestFor(to: Uuid, deviceAddress?: string): MigrateRequest {
    const { mode, engine, bandwidthBps } = this.#options.config.migration;
    return {
      to,
      ...(deviceAddress === undefined ? {} : { device: deviceAddress }),
      ...(mode ? { mode } : {}),
      ...(engine ? { engine } : {}),
      ...(bandwidthBps === undefined ? {} : { limits: { bandwidthBps } }),
    };
  }
}
