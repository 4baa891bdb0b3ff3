/** When the mirror of a disk is to hold the guest's writes until they are there too. Pure. */
import { MiB } from '../model/units.ts';

/** Where a mirror is, in bytes: `totalBytes` grows with what the guest writes meanwhile. */
export interface MirrorProgress {
  doneBytes: number;
  totalBytes: number;
}

/** Copied without the rest getting smaller: no burst of the guest, but one that writes as fast as the link copies. */
const patienceShare = 1 / 8;
const leastPatienceBytes = 16 * MiB;

/** Tells of a mirror that would not catch up with its guest. */
export class StallWatch {
  #least: { restBytes: number; doneBytes: number } | undefined;

  /** Judged by bytes and not by time, so that a link that is cut for a while counts for nothing. */
  hasStalled({ doneBytes, totalBytes }: MirrorProgress): boolean {
    const restBytes = totalBytes - doneBytes;
    if (!this.#least || restBytes < this.#least.restBytes) this.#least = { restBytes, doneBytes };
    const patience = Math.max(leastPatienceBytes, this.#least.restBytes * patienceShare);
    return doneBytes - this.#least.doneBytes > patience;
  }
}
