/**
 * Keeps a connection to the other cloudlet open while its next message is to come at once: an idle one is closed after
 * 30 s, and a new one costs two round trips while the VM stands still.
 */
const everyMs = 10_000;

export class InTouch {
  readonly #warm: () => Promise<void>;
  #timer: NodeJS.Timeout | undefined;

  constructor(warm: () => Promise<void>) {
    this.#warm = warm;
  }

  /** From now on, or no longer. */
  keep(isOn: boolean): void {
    if (!isOn) {
      clearInterval(this.#timer);
      this.#timer = undefined;
    } else if (!this.#timer) {
      // What comes of it matters to nobody: the next message connects by itself if it has to.
      const warm = (): void => void this.#warm().catch(() => {});
      this.#timer = setInterval(warm, everyMs).unref();
      warm();
    }
  }
}
