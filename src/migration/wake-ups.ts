/**
 * Rests between two looks at QEMU, which its next event of these names cuts short: also one that has come since the
 * rest before, so that none falls between a look and the rest after it.
 */
import { delay, type QmpConnection, type QmpEvent } from '../qmp/index.ts';

export class WakeUps implements Disposable {
  readonly #unsubscribe: () => void;
  #came = Promise.withResolvers<void>();

  constructor(qmp: QmpConnection, names: readonly QmpEvent['name'][]) {
    this.#unsubscribe = qmp.onEvent(({ name }) => {
      if (names.includes(name)) this.#came.resolve();
    });
  }

  /** Resolves after `ms` at the latest; rejects with the reason of the signal. */
  async rest(ms: number, signal: AbortSignal): Promise<void> {
    const rested = new AbortController();
    const until = delay(ms, AbortSignal.any([signal, rested.signal])).catch((error) => {
      if (signal.aborted) throw error;
    });
    await Promise.race([this.#came.promise, until]);
    rested.abort();
    this.#came = Promise.withResolvers();
  }

  [Symbol.dispose](): void {
    this.#unsubscribe();
  }
}
