/**
 * A daemon is started to be small (`--optimize-for-size` in `bin/viper`): V8 then collects the whole heap for every few
 * megabytes of buffers, and while a VM moves that takes more CPU than its bytes. So for this time it does not.
 */
import { setFlagsFromString } from 'node:v8';

export const smallFlag = '--optimize-for-size';
export const fastFlag = '--no-optimize-for-size';

export interface HeapPolicyOptions {
  /** With which this process was started. */
  startedWith?: readonly string[];
  /** V8 looks at these flags before each collection, so they may change at any time. */
  setFlag?: (flag: string) => void;
}

export class HeapPolicy {
  readonly #isStartedSmall: boolean;
  readonly #setFlag: (flag: string) => void;
  #isFast = false;

  constructor({ startedWith = process.execArgv, setFlag = setFlagsFromString }: HeapPolicyOptions = {}) {
    // Who starts the daemon in another way has chosen for himself.
    this.#isStartedSmall = startedWith.includes(smallFlag);
    this.#setFlag = setFlag;
  }

  favourSpeed(isFast: boolean): void {
    if (!this.#isStartedSmall || isFast === this.#isFast) return;
    this.#isFast = isFast;
    this.#setFlag(isFast ? fastFlag : smallFlag);
  }
}
