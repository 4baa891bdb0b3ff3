/**
 * Whether relays are worth what they take of the source's uplink. Each slab goes to several of them, and must be fetched
 * again: where the destination takes all that can leave, they only make everything later. So at first the destination is
 * given to alone, then relays too, and they go on only if together more is placed in the same time. Pure: bytes and times
 * in, a yes or no out.
 */
export interface Placed {
  now: number;
  /** That the destination has, and that relays have, each content counted once. */
  directBytes: number;
  relayedBytes: number;
  /** What relays took in a ms when they were given to last; 0 where nobody knows. */
  relaysPerMs: number;
}

const aloneMs = 300;
/** After this long one that takes so many times less than relays do is slow, whatever comes. */
const glanceMs = 100;
const clearlySlower = 3;
/** Until relays have answered for the first time nothing is counted. */
const settleMs = 250;
const togetherMs = 500;
const closedMs = 5000;
/** A destination that takes so much less than before has become slow. */
const slowed = 2;
/** Less than this is noise. */
const worthwhile = 1.15;

type Phase = 'alone' | 'settling' | 'together' | 'open' | 'closed';

export class RelayGate {
  #phase: Phase = 'alone';
  #began: Placed | undefined;
  /** What the destination took alone, in bytes per ms. */
  #alone = 0;
  #closedAt = 0;

  /** Call it often. */
  isOpen(placed: Placed): boolean {
    this.#began ??= placed;
    const tookMs = placed.now - this.#began.now;
    const next = this.#next(placed, tookMs);
    if (next) {
      this.#phase = next;
      this.#began = placed;
    }
    return this.#phase !== 'alone' && this.#phase !== 'closed';
  }

  #next(placed: Placed, tookMs: number): Phase | undefined {
    const direct = placed.directBytes - this.#began!.directBytes;
    const relayed = placed.relayedBytes - this.#began!.relayedBytes;
    switch (this.#phase) {
      case 'alone':
        if (tookMs < glanceMs) return undefined;
        if (tookMs < aloneMs && (direct / tookMs) * clearlySlower >= placed.relaysPerMs) return undefined;
        this.#alone = direct / tookMs;
        return 'settling';
      case 'settling':
        return tookMs < settleMs ? undefined : 'together';
      case 'together':
      case 'open':
        if (tookMs < togetherMs) return undefined;
        this.#closedAt = placed.now;
        return (direct + relayed) / tookMs > this.#alone * worthwhile ? 'open' : 'closed';
      case 'closed': {
        if (tookMs < togetherMs) return undefined;
        const hasSlowed = direct / tookMs < this.#alone / slowed;
        if (!hasSlowed && placed.now - this.#closedAt < closedMs) return 'closed';
        this.#alone = direct / tookMs;
        return 'settling';
      }
    }
  }
}
