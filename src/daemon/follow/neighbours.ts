/**
 * The possible-neighbour database of this cloudlet, kept fresh: every minute each peer gets a few probes, a new one at
 * once. Peers greet each other first, over HTTPS, where each tells its LANs and gives the key for the probes.
 */
import { lookup } from 'node:dns/promises';
import { isIP } from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import type { FastifyBaseLogger } from 'fastify';
import type { Static } from 'typebox';
import * as schemas from '../../contract/schemas.ts';
import {
  type Neighbour,
  newNeighbour,
  observeProbes,
  observeTransfer,
  type Standing,
  standingOf,
} from '../../follow/index.ts';
import type { Peer } from '../../model/fleet.ts';
import type { Uuid } from '../../model/ids.ts';
import type { Fleet } from '../fleet.ts';
import { compileFor } from '../http/validation.ts';
import type { Store } from '../store/index.ts';
import type { FollowConfig } from './config.ts';
import type { Echo } from './echo.ts';

export type Greeting = Static<typeof schemas.Greeting>;
export type Greeted = Static<typeof schemas.Greeted>;

const isGreeted = compileFor('body', schemas.Greeted);
const probes = { count: 4, gapMs: 40, timeoutMs: 1000 };
/** Peers measured at the same time. */
const parallel = 10;
const greetTimeoutMs = 5000;
/** What is known of a peer's LANs and key is asked again after so long, and whenever it does not answer. */
const greetEveryMs = 600_000;

export interface NeighboursOptions {
  fleet: Fleet;
  store: Store;
  echo: Echo;
  config: FollowConfig;
  log: FastifyBaseLogger;
  /** What we tell of ourselves. */
  greeting: () => Greeting;
}

interface Met {
  greeted: Greeted;
  atMs: number;
  address: string;
  /** What we told of ourselves, to tell it again when it has changed. */
  told: string;
}

export class Neighbours {
  readonly #options: NeighboursOptions;
  readonly #known = new Map<Uuid, Neighbour>();
  readonly #met = new Map<Uuid, Met>();
  readonly #closing = new AbortController();
  #wake = Promise.withResolvers<void>();
  #measuring: Promise<void> | undefined;

  constructor(options: NeighboursOptions) {
    this.#options = options;
    for (const neighbour of options.store.neighbours.all()) this.#known.set(neighbour.cloudletId, neighbour);
  }

  start(): void {
    const { fleet } = this.#options;
    fleet.onChanged(() => {
      this.#forgetRemoved();
      this.#wake.resolve();
    });
    this.#forgetRemoved();
    this.#measuring = this.#measureForever();
  }

  /** Every peer, with what is known of the way to it. */
  all(nowMs = Date.now()): { peer: Peer; neighbour: Neighbour; standing: Standing; greeted?: Greeted }[] {
    const { fleet, config } = this.#options;
    const policy = { acceptableMs: config.neighbourRttMs, silentAfterMs: 3 * config.measureEveryMs };
    return fleet.peers().map((peer) => {
      const neighbour = this.#known.get(peer.id) ?? newNeighbour(peer.id);
      const greeted = this.#met.get(peer.id)?.greeted;
      return { peer, neighbour, standing: standingOf(neighbour, policy, nowMs), ...(greeted && { greeted }) };
    });
  }

  view(): Static<typeof schemas.NeighbourList> {
    const items = this.all().map(({ peer, neighbour: { rtt, bandwidthBps, lans }, standing }) => ({
      cloudletId: peer.id,
      name: peer.name,
      url: peer.url,
      standing,
      ...(rtt.samples > 0
        ? {
            rttMs: rounded(rtt.smoothedMs),
            jitterMs: rounded(rtt.jitterMs),
            minMs: rounded(rtt.minMs),
            answeredAt: new Date(rtt.answeredAtMs).toISOString(),
          }
        : {}),
      lossRatio: rounded(rtt.lossRatio),
      samples: rtt.samples,
      ...(bandwidthBps === undefined ? {} : { bandwidthBps: Math.round(bandwidthBps) }),
      lans: [...lans],
    }));
    return { acceptableMs: this.#options.config.neighbourRttMs, items };
  }

  /** A peer greets us: it learns our LANs and the key that it shall use. */
  greeted(peerId: Uuid, greeting: Greeting): Greeted {
    const { echo } = this.#options;
    this.#update(peerId, (known) => ({ ...known, lans: greeting.lans }));
    const { port } = echo;
    const key = echo.keyFor(peerId).toString('base64url');
    return { ...this.#options.greeting(), ...(port === undefined ? {} : { echo: { port, key } }) };
  }

  /** What a finished migration says of the bandwidth to a peer. */
  transferred(peerId: Uuid, rateBps: number, capBps?: number): void {
    this.#update(peerId, (known) => observeTransfer(known, rateBps, capBps));
  }

  get(peerId: Uuid): Neighbour | undefined {
    return this.#known.get(peerId);
  }

  /** One round of probes to every peer. */
  async measureAll(): Promise<void> {
    const waiting = this.#options.fleet.peers();
    const worker = async () => {
      for (let peer = waiting.shift(); peer && !this.#closing.signal.aborted; peer = waiting.shift())
        await this.#measure(peer);
    };
    await Promise.all(Array.from({ length: Math.min(parallel, waiting.length) }, worker));
  }

  async #measureForever(): Promise<void> {
    const { config, log } = this.#options;
    const { signal } = this.#closing;
    while (!signal.aborted) {
      this.#wake = Promise.withResolvers<void>();
      await this.measureAll().catch((error) => log.warn({ err: error }, 'measuring the neighbours failed'));
      const due = sleep(config.measureEveryMs, undefined, { signal, ref: false }).catch(() => {});
      await Promise.race([due, this.#wake.promise]);
    }
  }

  async #measure(peer: Peer): Promise<void> {
    let met = this.#met.get(peer.id);
    const isOld = met && (Date.now() - met.atMs > greetEveryMs || met.told !== this.#told());
    if (!met || isOld) met = await this.#greet(peer);
    let samples = met ? await this.#probe(met) : [];
    if (met && samples.every((each) => each === 'lost')) {
      // It may have started again, with another key and port.
      met = await this.#greet(peer);
      samples = met ? await this.#probe(met) : [];
    }
    // Where no datagram comes through, the exchange over HTTPS still tells something.
    if (met && samples.every((each) => each === 'lost')) samples = await this.#timeRequests(peer);
    if (!this.#options.fleet.directory.get(peer.id)) return;
    const list = samples.length > 0 ? samples : (['lost'] as const);
    this.#update(peer.id, (known) => observeProbes(known, list, Date.now()));
  }

  #told = (): string => JSON.stringify(this.#options.greeting());

  async #greet(peer: Peer): Promise<Met | undefined> {
    const { fleet, greeting } = this.#options;
    const told = this.#told();
    try {
      const answer = await fleet.client.fetch(peer, '/v1/neighbours/greetings', {
        method: 'POST',
        json: greeting(),
        timeoutMs: greetTimeoutMs,
        signal: this.#closing.signal,
      });
      if (!isGreeted(answer)) return undefined;
      const address = await addressOf(peer.url);
      const met = { greeted: answer as Greeted, atMs: Date.now(), address, told };
      this.#met.set(peer.id, met);
      this.#update(peer.id, (known) => ({ ...known, lans: met.greeted.lans }));
      return met;
    } catch {
      // It is measured again in a minute; until then it has lost its probes.
      this.#met.delete(peer.id);
      return undefined;
    }
  }

  async #probe({ greeted: { echo }, address }: Met): Promise<(number | 'lost')[]> {
    if (!echo) return [];
    const target = { address, port: echo.port, key: Buffer.from(echo.key, 'base64url') };
    return this.#options.echo.probe(target, probes);
  }

  /** The second request on a connection that is there takes one round trip and what the peer needs for it. */
  async #timeRequests(peer: Peer): Promise<(number | 'lost')[]> {
    const { client } = this.#options.fleet;
    const timings: number[] = [];
    try {
      for (let i = 0; i < 3; i += 1) {
        const begun = performance.now();
        await client.fetch(peer, '/healthz', { timeoutMs: greetTimeoutMs, signal: this.#closing.signal });
        timings.push(performance.now() - begun);
      }
    } catch {
      return ['lost'];
    }
    return [Math.min(...timings.slice(1))];
  }

  #update(peerId: Uuid, change: (known: Neighbour) => Neighbour): void {
    const { fleet, store } = this.#options;
    if (!fleet.directory.get(peerId) || this.#closing.signal.aborted) return;
    const neighbour = change(this.#known.get(peerId) ?? newNeighbour(peerId));
    this.#known.set(peerId, neighbour);
    store.relaxed(() => store.neighbours.put(neighbour));
  }

  #forgetRemoved(): void {
    const { fleet, store } = this.#options;
    for (const id of this.#known.keys()) {
      if (fleet.directory.get(id)) continue;
      this.#known.delete(id);
      this.#met.delete(id);
      store.neighbours.delete(id);
    }
  }

  async close(): Promise<void> {
    this.#closing.abort();
    this.#wake.resolve();
    await this.#measuring;
  }
}

async function addressOf(url: string): Promise<string> {
  const host = new URL(url).hostname.replace(/^\[|\]$/g, '');
  return isIP(host) ? host : (await lookup(host)).address;
}

const rounded = (value: number): number => Math.round(value * 100) / 100;
