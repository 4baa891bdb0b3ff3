/** What finished migrations teach: the factors of forecasts, the bandwidth to each peer, the RTT while bytes travel. */
import type { Static } from 'typebox';
import * as schemas from '../../contract/schemas.ts';
import {
  assumedDeltaRttMs,
  correct,
  isUsable,
  learnMs,
  mergeSamples,
  type ProfileQuery,
  samplesKept,
} from '../../follow/index.ts';
import type { HandoffForecast, ProfileSample } from '../../model/follow.ts';
import type { Uuid } from '../../model/ids.ts';
import { compileFor } from '../http/validation.ts';
import type { Forecast } from '../migrations/forecast.ts';
import type { MigrationRecord } from '../migrations/record.ts';
import type { MigrationStart } from '../migrations/service.ts';
import type { Store } from '../store/index.ts';

const isProfile = compileFor('body', schemas.Profile);

export class Profiles {
  readonly #store: Store;
  /** Migrations at work, with what was known before them. */
  readonly #started = new Map<Uuid, ProfileQuery>();
  /** By peer: what a migration to it added to the RTT of a device. */
  readonly #deltaRttMs = new Map<Uuid, number>();
  #samples: ProfileSample[];

  constructor(store: Store) {
    this.#store = store;
    this.#samples = store.profile.latest(samplesKept);
  }

  all(): Static<typeof schemas.Profile> {
    return { items: this.#samples };
  }

  /** Samples of our own or of others; too few to do without the profile of a peer? */
  get isYoung(): boolean {
    return this.#samples.length < 20;
  }

  started(id: Uuid, query: ProfileQuery): void {
    this.#started.set(id, query);
  }

  /** Learns from a migration that has ended here, if it was begun under this daemon and moved the VM. */
  ended(record: MigrationRecord): ProfileSample | undefined {
    const query = this.#started.get(record.id);
    this.#started.delete(record.id);
    const { result, finishedAt } = record;
    if (!query || record.state.name !== 'moved' || result?.downtimeMs === undefined || !finishedAt)
      return undefined;
    const { totalMs, downtimeMs } = result;
    const sample = { ...query, migrationId: record.id, at: finishedAt, totalMs, downtimeMs };
    this.#keep([sample]);
    return sample;
  }

  /** Takes what a peer's profile says; gives how many samples are new. Anything else is refused whole. */
  learnFrom(profile: unknown): number {
    if (!isProfile(profile)) return 0;
    const known = new Set(this.#samples.map(({ migrationId }) => migrationId));
    const fresh = (profile as Static<typeof schemas.Profile>).items.filter(
      ({ migrationId }) => !known.has(migrationId),
    );
    this.#keep(fresh);
    return fresh.length;
  }

  #keep(samples: readonly ProfileSample[]): void {
    const good = samples.filter(isUsable);
    this.#samples = mergeSamples(this.#samples, good);
    this.#store.transact(() => {
      for (const sample of good) this.#store.profile.put(sample, samplesKept);
    });
  }

  learnDeltaRtt(peerId: Uuid, deltaMs: number): void {
    this.#deltaRttMs.set(peerId, learnMs(this.#deltaRttMs.get(peerId), Math.max(0, deltaMs)));
  }

  /** The model's forecast as past migrations correct it. */
  correct(model: Forecast, start: Omit<MigrationStart, 'id'>): Forecast & { learnedFrom: number } {
    const { totalMs, downtimeMs, learnedFrom } = correct(queryOf(model, start), this.#samples);
    return { ...model, totalMs, downtimeMs, learnedFrom, inputs: { ...model.inputs, learnedFrom } };
  }

  /** All of a forecast that a decision wants. */
  handoff(
    model: Forecast,
    start: Omit<MigrationStart, 'id'>,
    { neighbourRttMs, serviceInitiationMs }: { neighbourRttMs: number; serviceInitiationMs: number },
  ): HandoffForecast {
    const { totalMs, downtimeMs, bytes, learnedFrom } = this.correct(model, start);
    const deltaRttMs = Math.round(this.#deltaRttMs.get(start.peer.id) ?? assumedDeltaRttMs(neighbourRttMs));
    return { totalMs, downtimeMs, bytes, deltaRttMs, serviceInitiationMs, learnedFrom };
  }
}

/** What was known before a migration, in the terms of the profile. */
export function queryOf(
  { totalMs, downtimeMs, inputs }: Forecast,
  { vm, options, peer }: Omit<MigrationStart, 'id'>,
): ProfileQuery {
  const { engine = 'direct' } = options as { engine?: string };
  return {
    peerId: peer.id,
    way: `${engine} ${options.mode} ${options.storage}`,
    memoryBytes: vm.spec.memoryBytes,
    diskBytes: inputs.diskBytes ?? 0,
    dirtyBps: inputs.dirtyBps ?? 0,
    bandwidthBps: inputs.bandwidthBps ?? 0,
    rttMs: inputs.rttMs ?? 0,
    modelTotalMs: totalMs,
    modelDowntimeMs: downtimeMs,
  };
}
