/** How far an agent at the source is, for all parts of it, and what wakes those that wait for something to do. */
export class Course {
  /** What becomes of the pages that QEMU writes; see `source-agent.ts`. */
  state: 'copying' | 'draining' | 'serving' = 'copying';
  /** The VM has stood still: relays get nothing before it runs at the destination. */
  isLeaving = false;
  /** The destination needs nothing any more. */
  isEnded = false;
  #woken = Promise.withResolvers<void>();

  wake(): void {
    this.#woken.resolve();
  }

  /** Resolves with the next call of `wake`, or at once if there was one since `rearm`. */
  get woken(): Promise<void> {
    return this.#woken.promise;
  }

  /** Before one looks for something to do again: what comes from now on wakes anew. */
  rearm(): void {
    this.#woken = Promise.withResolvers();
  }
}
