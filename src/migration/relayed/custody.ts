/**
 * The custodian's part, as the destination sees it: a third cloudlet that is left with what may let it go on with the VM, and
 * whose word counts before the VM is whole here, or has ended.
 */

import type { Manifest } from './manifest.ts';
import type { WholeStream } from './memory-merging.ts';

/** What a third cloudlet is left with, which may go on with the VM if this one is lost; and its word. */
export interface Escrow {
  /** Resolves when it is held there; tries until then. */
  deposit: (manifest: Manifest, whole: WholeStream, signal: AbortSignal) => Promise<void>;
  /**
   * The epoch by which it runs the VM itself; `undefined` if it does not, or does not answer. `isGone`: nobody runs it
   * here.
   */
  ask: (isGone: boolean) => Promise<number | undefined>;
  /** As `ask`, and from `undefined` on it never will. Tries until it is answered. */
  release: (signal: AbortSignal) => Promise<number | undefined>;
}

export class Custody {
  readonly #escrow: Escrow;
  readonly #signal: AbortSignal;
  /** The source has heard that the VM runs here: it will never run it again. */
  readonly #heard = Promise.withResolvers<void>();
  readonly #decided = Promise.withResolvers<undefined>();
  #release: Promise<number | undefined> | undefined;
  #isAsking = false;
  /** The VM has ended while the daemon was away, and it is for a human to say where it goes on. */
  #isUndecided = false;

  constructor(escrow: Escrow, signal: AbortSignal) {
    this.#escrow = escrow;
    this.#signal = signal;
  }

  /** The source knows that it will never run the VM again. */
  noteHeard(): void {
    this.#heard.resolve();
  }

  /** Only once no way leads back to the source. False: the VM is not ours any more, by then, and nothing was deposited. */
  async deposit(manifest: Manifest, whole: WholeStream, isOurs: () => boolean): Promise<boolean> {
    await this.#heard.promise;
    if (!isOurs()) return false;
    await this.#escrow.deposit(manifest, whole, this.#signal);
    return true;
  }

  /** The epoch by which it runs the VM; `undefined` if it does not, does not answer, or is being asked already. */
  async ask(): Promise<number | undefined> {
    if (this.#isAsking) return undefined;
    this.#isAsking = true;
    try {
      return await this.#escrow.ask(this.#isUndecided);
    } finally {
      this.#isAsking = false;
    }
  }

  /** Resolves when it has given up its right to the VM, or an operator has said so for it; or with the epoch of its claim. */
  release(): Promise<number | undefined> {
    this.#release ??= this.#escrow.release(this.#signal);
    return Promise.race([this.#release, this.#decided.promise]);
  }

  /** It is for a human to say where the VM goes on, which has ended here. */
  leaveUndecided(): void {
    this.#isUndecided = true;
  }

  /** A human has: here. False if nothing was left undecided. */
  takeDecision(): boolean {
    const wasUndecided = this.#isUndecided;
    this.#isUndecided = false;
    return wasUndecided;
  }

  /** It was asked for its release and does not answer: it is gone for good, says the operator. False if it was not asked. */
  doWithout(): boolean {
    if (!this.#release) return false;
    this.#decided.resolve(undefined);
    return true;
  }
}
