/** Answers a peer that asks how near a device is: is it in a LAN here, and what is the round trip to it. */
import type { Static } from 'typebox';
import type * as schemas from '../../contract/schemas.ts';
import type { Load } from '../../follow/index.ts';
import { AppError } from '../../model/errors.ts';
import type { CloudletNetwork } from '../../network/index.ts';
import { pingBriefly } from './ping.ts';
import { lookFor } from './sightings.ts';

export type AskNearness = Static<typeof schemas.AskNearness>;
export type Nearness = Static<typeof schemas.Nearness>;

/** Each starts some processes. */
const maxAtOnce = 32;

export class NearnessDesk {
  readonly #networks: readonly CloudletNetwork[];
  readonly #serviceInitiationMs: () => number | undefined;
  readonly #load: () => Load | undefined;
  #busy = 0;

  constructor(
    networks: readonly CloudletNetwork[],
    serviceInitiationMs: () => number | undefined,
    load: () => Load | undefined,
  ) {
    this.#networks = networks;
    this.#load = load;
    this.#serviceInitiationMs = serviceInitiationMs;
  }

  /** Errors: `too_many`. */
  async answer({ addresses, macs, deadlineMs }: AskNearness, closing?: AbortSignal): Promise<Nearness> {
    if (this.#busy >= maxAtOnce) {
      throw new AppError('too_many', `${maxAtOnce} questions of this kind are being answered`, {
        limit: maxAtOnce,
      });
    }
    this.#busy += 1;
    try {
      const deadline = AbortSignal.timeout(deadlineMs);
      const signal = closing ? AbortSignal.any([deadline, closing]) : deadline;
      const sighting = lookFor(this.#networks, { macs, addresses });
      const atOnce = addresses.map((address) => pingOne(address, signal));
      const { sees, address: here } = await sighting;
      if (here !== undefined && !addresses.includes(here)) atOnce.unshift(pingOne(here, signal));
      const answer = await firstFound(atOnce);
      const serviceInitiationMs = this.#serviceInitiationMs();
      const load = this.#load();
      return {
        seesDevice: sees,
        ...(answer ?? (here === undefined ? {} : { address: here })),
        ...(load ? { load } : {}),
        ...(serviceInitiationMs === undefined ? {} : { serviceInitiationMs }),
      };
    } finally {
      this.#busy -= 1;
    }
  }
}

async function pingOne(
  address: string,
  signal: AbortSignal,
): Promise<{ address: string; rttMs: number } | undefined> {
  const rttMs = await pingBriefly(address, signal);
  return rttMs === undefined ? undefined : { address, rttMs };
}

/** The first that comes to something, or undefined when none does. */
async function firstFound<T>(all: Promise<T | undefined>[]): Promise<T | undefined> {
  const found = all.map(async (each) => (await each) ?? Promise.reject(new Error('nothing')));
  return Promise.any(found).catch(() => undefined);
}
