/**
 * What the rounds of the source's QEMU tell of the guest: which pages it writes, and how well what changes can be condensed.
 * When the agent drains it *samples*: QEMU is read slowly, and each round shows what was written in a moment.
 */
import { PageHeat } from './page-heat.ts';

/** For so long QEMU is read slowly. */
const sampleMs = 500;
/** For so long at most, where there is something else to wait for. */
const mostSampleMs = 2500;
/** Until a round has shown how well what changes can be condensed. */
const unknownRatio = 1;

export class QemuRounds {
  #number = 1;
  #heat = new PageHeat(0);
  /** Since when QEMU is read slowly: from the first round that began while it drained. */
  #sampledSince: number | undefined;
  /** Of the round before: bytes on the link for each byte of the guest. */
  #ratio = unknownRatio;
  #atRound = { guestBytes: 0, wireBytes: 0 };

  begin(pages: number): void {
    this.#heat = new PageHeat(pages);
  }

  /** The round that is under way. */
  get number(): number {
    return this.#number;
  }

  get heat(): PageHeat {
    return this.#heat;
  }

  /** Whether this one has just begun. */
  note(round: number): boolean {
    if (round <= this.#number) return false;
    this.#heat.noteRounds(round - this.#number);
    this.#number = round;
    return true;
  }

  /** What was condensed, and what came of it, when a round began. */
  measure(guestBytes: number, wireBytes: number): void {
    const guest = guestBytes - this.#atRound.guestBytes;
    // The first one is all of the memory, of which the other end has most: it says nothing about what changes.
    if (guest > 0 && this.#number > 2)
      this.#ratio = Math.min(1, (wireBytes - this.#atRound.wireBytes) / guest);
    this.#atRound = { guestBytes, wireBytes };
  }

  /** Bytes on the link for each byte that the guest changes. */
  get ratio(): number {
    return this.#ratio;
  }

  beginToSample(): void {
    this.#heat.begin();
    this.#sampledSince = performance.now();
  }

  get isSampling(): boolean {
    return this.#sampledSince !== undefined;
  }

  /** Whether it will have been sampled for long enough after so many ms. */
  isSampledIn(ms: number): boolean {
    return this.#sampledSince !== undefined && performance.now() - this.#sampledSince > sampleMs - ms;
  }

  /** Whether it has been sampled for long enough; if `isWaitedFor` does not hold any more, this is sooner. */
  isSampled(isWaitedFor: () => boolean): boolean {
    if (this.#sampledSince === undefined) return false;
    const sampledMs = performance.now() - this.#sampledSince;
    return sampledMs > mostSampleMs || (sampledMs > sampleMs && !isWaitedFor());
  }
}
