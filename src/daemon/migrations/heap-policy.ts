/**
 * A daemon is started to be small (`--optimize-for-size` in `bin/viper`): V8 then collects the whole heap for every few
 * megabytes of buffers, and while a VM moves that takes more CPU than its bytes. So for this time it does not, and lets
 * heap and buffers grow to three times what was left of them, about 60 MB more, before it collects the heap again.
 */
import { setFlagsFromString } from 'node:v8';

export const smallFlag = '--optimize-for-size';
export const smallFlags = `${smallFlag} --heap-growing-percent=0`;
export const fastFlags = '--no-optimize-for-size --heap-growing-percent=200';

export interface HeapPolicyOptions {
  /** With which this process was started. */
  startedWith?: readonly string[];
  /** V8 looks at these flags before each collection, so they may change at any time. */
  setFlags?: (flags: string) => void;
}

export class HeapPolicy {
  readonly #isStartedSmall: boolean;
  readonly #setFlags: (flags: string) => void;
  #isFast = false;

  constructor({ startedWith = process.execArgv, setFlags = setFlagsFromString }: HeapPolicyOptions = {}) {
    // Who starts the daemon in another way has chosen for himself.
    this.#isStartedSmall = startedWith.includes(smallFlag);
    this.#setFlags = setFlags;
  }

  favourSpeed(isFast: boolean): void {
    if (!this.#isStartedSmall || isFast === this.#isFast) return;
    this.#isFast = isFast;
    this.#setFlags(isFast ? fastFlags : smallFlags);
  }
}
