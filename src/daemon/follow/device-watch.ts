/**
 * Watches one device whose VM is here: the round trip to it, the LAN that it is in, and what it reports of itself. Says
 * when it is time to think about moving the VM; one thought at a time.
 */
import {
  type Fired,
  newTriggerState,
  noRtt,
  type Observation,
  observe,
  observeRtt,
  type TriggerPolicy,
  type TriggerState,
} from '../../follow/index.ts';
import type { RttStats } from '../../model/follow.ts';
import type { Uuid } from '../../model/ids.ts';
import { PingWatch } from './ping.ts';

export interface DeviceWatchOptions {
  ownId: Uuid;
  policy: TriggerPolicy;
  watchEveryMs: number;
  /** Start of the migration that brought the VM here. */
  movedAtMs: number | undefined;
  /** What comes of a trigger. */
  onTrigger: (fired: Fired) => Promise<{ moved: boolean }>;
  now?: () => number;
}

const tickMs = 250;
/** A report of the device counts for so long. */
const reportFreshMs = 15_000;

export class DeviceWatch implements Disposable {
  readonly #options: DeviceWatchOptions;
  readonly #now: () => number;
  readonly #ticks: NodeJS.Timeout;
  readonly #reported = new Map<Uuid, { rttMs: number; atMs: number }>();
  #state: TriggerState;
  #rtt: RttStats = noRtt;
  #ping: PingWatch | undefined;
  #address: string | undefined;
  #thinking = false;

  constructor(options: DeviceWatchOptions) {
    this.#options = options;
    this.#now = options.now ?? Date.now;
    this.#state = newTriggerState(this.#now(), options.movedAtMs);
    this.#ticks = setInterval(() => this.#observe({ kind: 'tick', atMs: this.#now() }), tickMs);
    this.#ticks.unref();
  }

  get rtt(): RttStats {
    return this.#rtt;
  }

  get lan(): Uuid | undefined {
    return this.#state.lan;
  }

  /** RTTs that the device measured itself and told of late. Of one that is lost they say where it was. */
  reported(): Map<Uuid, number> {
    const now = this.#now();
    if (now - this.#state.heardAtMs >= this.#options.policy.lostAfterMs) return new Map();
    const since = now - reportFreshMs;
    return new Map(
      [...this.#reported].flatMap(([id, { rttMs, atMs }]) => (atMs >= since ? [[id, rttMs] as const] : [])),
    );
  }

  /** The address at which it is now; another one begins the statistics anew. */
  follow(address: string | undefined): void {
    if (address === this.#address) return;
    this.#address = address;
    this.#ping?.[Symbol.dispose]();
    this.#rtt = noRtt;
    this.#ping =
      address === undefined
        ? undefined
        : new PingWatch(address, this.#options.watchEveryMs, (each) => this.#sample(each));
  }

  /** The device told in which LAN it is (of which cloudlet, if any) and what it measured. */
  report(lan: Uuid | undefined, rtts: readonly { cloudletId: Uuid; rttMs: number }[]): void {
    const atMs = this.#now();
    // What it measured in another LAN says nothing about this one.
    if (lan !== this.#state.lan) this.#reported.clear();
    for (const { cloudletId, rttMs } of rtts) this.#reported.set(cloudletId, { rttMs, atMs });
    const own = this.#reported.get(this.#options.ownId);
    // Where no ping comes through, its own measurement stands in.
    if (own?.atMs === atMs && (!this.#ping || this.#rtt.lostInRow > 0)) this.#sample(own.rttMs);
    this.#observe({ kind: 'lan', cloudletId: lan, atMs });
  }

  #sample(sample: number | 'lost'): void {
    const atMs = this.#now();
    this.#rtt = observeRtt(this.#rtt, sample, atMs);
    if (sample === 'lost') this.#observe({ kind: 'tick', atMs });
    else this.#observe({ kind: 'rtt', smoothedMs: this.#rtt.smoothedMs, atMs });
  }

  #observe(observation: Observation): void {
    const { policy, ownId, onTrigger } = this.#options;
    const { state, fired } = observe(this.#state, observation, policy, ownId);
    this.#state = state;
    if (!fired || this.#thinking) return;
    this.#thinking = true;
    onTrigger(fired)
      .catch(() => ({ moved: false }))
      .then(({ moved }) => {
        this.#thinking = false;
        const atMs = this.#now();
        const outcome: Observation = moved
          ? { kind: 'moved', atMs }
          : { kind: 'stayed', key: fired.key, atMs };
        this.#state = observe(this.#state, outcome, policy, ownId).state;
      });
  }

  [Symbol.dispose](): void {
    clearInterval(this.#ticks);
    this.#ping?.[Symbol.dispose]();
  }
}
