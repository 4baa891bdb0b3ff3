/**
 * At the source: puts a sealed slab on as many relays as are wanted. It leaves once: the relay that has it gives it on to
 * others, each of which says to the source itself that it has come, and is what was sent. Where that takes long, the source
 * sends it again.
 */
import { hash } from 'node:crypto';
import { AppError } from '../../model/errors.ts';
import { place } from './placement.ts';
import type { RelayEnds } from './relay-ends.ts';
import { within } from './within.ts';

/** A relay that has not answered by then gets company. */
const slowMs = 4000;
/** While nothing else leaves, a replica that another relay is to make is waited for no longer than this. */
const idleMs = 250;
const tickMs = 50;

export class SlabPlacer {
  readonly #relays: RelayEnds;
  readonly #replicas: number;
  #change = Promise.withResolvers<void>();
  /** Replicas that other relays are to make. */
  readonly #passes = new Set<{ since: number; giveUp: () => void }>();
  /** When something was on its way from here to a relay last. */
  #busyAt = 0;
  #timer: NodeJS.Timeout | undefined;

  constructor(relays: RelayEnds, replicas: number) {
    this.#relays = relays;
    this.#replicas = replicas;
  }

  begin(): void {
    this.#timer ??= setInterval(() => this.#hurry(), tickMs);
  }

  end(): void {
    clearInterval(this.#timer);
  }

  /** Something has changed at the relays. */
  changed(): void {
    this.#change.resolve();
    this.#change = Promise.withResolvers();
  }

  /** The relays that hold it. Rejects when there are not enough that take it. */
  async place(slab: number, sealed: Buffer): Promise<Set<number>> {
    const relays = this.#relays;
    const holders = new Set<number>();
    const asked = new Set<number>();
    const pending = new Set<number>();
    /** Those that have it from here, or are to have: whether they have taken it. */
    const givers = new Map<number, Promise<boolean>>();
    let patientUntil = 0;
    const begin = (relay: number): void => {
      asked.add(relay);
      pending.add(relay);
      patientUntil = performance.now() + slowMs + relays.queuedMs;
      const giver = [...givers].find(([each]) => relays.canPass(each));
      const giving = giver ? this.#pass(giver, relay, slab, sealed) : this.#put(relay, slab, sealed);
      if (!giver) givers.set(relay, giving);
      giving
        .then(
          (isHeld) => isHeld && holders.add(relay),
          () => {},
        )
        .finally(() => {
          pending.delete(relay);
          this.changed();
        });
    };
    while (holders.size < this.#replicas) {
      const lacking = this.#replicas - holders.size - pending.size;
      if (lacking > 0) {
        const placement = place(relays.views(asked), sealed.length, lacking);
        if (placement === 'none') throw new AppError('peer_unreachable', `No relay takes slab ${slab}`);
        for (const relay of placement === 'wait' ? [] : placement.relays) begin(relay);
      }
      await within(slowMs, this.#change.promise);
      if (pending.size === 0 || performance.now() < patientUntil) continue;
      // One of them gets company, and whoever answers first counts.
      const more = place(relays.views(asked), sealed.length, 1);
      if (typeof more !== 'string') for (const relay of pending) if (pending.delete(relay)) break;
    }
    return holders;
  }

  async #put(relay: number, slab: number, sealed: Buffer): Promise<boolean> {
    try {
      return await this.#relays.client(relay).put(slab, sealed);
    } finally {
      this.#busyAt = performance.now();
    }
  }

  /** By way of another relay, which is told in one flight with the slab; from here when that fails, or takes long. */
  async #pass(
    [giver, isTaken]: readonly [number, Promise<boolean>],
    relay: number,
    slab: number,
    sealed: Buffer,
  ): Promise<boolean> {
    const relays = this.#relays;
    const late = Promise.withResolvers<false>();
    const giveUp = () => late.resolve(false);
    // Before it is there it waits for the uplink, as it would again if it was sent again.
    const pass = { since: Number.POSITIVE_INFINITY, giveUp };
    isTaken.then((has) => {
      if (has) pass.since = performance.now();
      else giveUp();
    }, giveUp);
    this.#passes.add(pass);
    try {
      const digest = hash('sha256', sealed, 'buffer');
      const isThere = relays.client(relay).expect(slab, digest, sealed.length);
      const isPassed = relays.client(giver).pass(slab, relays.idOf(relay), sealed.length);
      relays.countPassing(giver, sealed.length, { isTaken, isPassed });
      const isArrived = isPassed.then(
        (isTakenThere) => isTakenThere && isThere,
        () => false,
      );
      // The relay itself says what it has.
      if (await Promise.race([isThere, isArrived, late.promise])) return true;
    } finally {
      this.#passes.delete(pass);
    }
    return this.#put(relay, slab, sealed);
  }

  /** While nothing leaves the source, it may as well send what others are late with. */
  #hurry(): void {
    const now = performance.now();
    if (this.#relays.inFlightBytes > 0) this.#busyAt = now;
    const patienceMs = now - this.#busyAt > idleMs ? idleMs : slowMs;
    for (const { since, giveUp } of this.#passes) if (now - since > patienceMs) giveUp();
  }
}
