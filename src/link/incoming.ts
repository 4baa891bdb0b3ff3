/**
 * The receiving half of a session, without I/O: what has arrived, what the reader took, what the sender may send.
 *
 *   consumed <= received <= limit,   limit <= consumed + the largest window that was ever asked for
 *
 * So at most a window of bytes lies here, whatever the sender does.
 */

export type IncomingRefusal = 'gap' | 'beyond_window' | 'beyond_end' | 'end_moved' | 'end_before_data';

export class Incoming {
  #received = 0;
  #consumed = 0;
  #limit = 0;
  #endOffset: number | undefined;

  /** What an ACK says: END counts as a byte. */
  get acknowledgement(): number {
    return this.#received + (this.ended ? 1 : 0);
  }
  get receivedBytes(): number {
    return this.#received;
  }
  get limit(): number {
    return this.#limit;
  }
  get ended(): boolean {
    return this.#endOffset !== undefined;
  }

  /** The part of a DATA piece that is new, which may be empty. */
  take(offset: number, bytes: Uint8Array): Uint8Array | IncomingRefusal {
    const end = offset + bytes.length;
    if (offset > this.#received) return 'gap';
    if (this.#endOffset !== undefined && end > this.#endOffset) return 'beyond_end';
    if (end > this.#limit) return 'beyond_window';
    if (end <= this.#received) return nothing;
    const fresh = offset === this.#received ? bytes : bytes.subarray(this.#received - offset);
    this.#received = end;
    return fresh;
  }

  /** END: nothing comes behind this offset. */
  end(offset: number): IncomingRefusal | undefined {
    if (this.#endOffset !== undefined) return this.#endOffset === offset ? undefined : 'end_moved';
    if (offset > this.#received) return 'gap';
    if (offset < this.#received) return 'end_before_data';
    this.#endOffset = offset;
    return undefined;
  }

  /** The reader took bytes. */
  consume(lengthBytes: number): void {
    this.#consumed += lengthBytes;
    if (this.#consumed > this.#received) throw new Error('Bug: a session gave out more than it received');
  }

  /** What the limit would be with this window; it never moves back. */
  limitWith(windowBytes: number): number {
    return Math.max(this.#limit, this.#consumed + windowBytes);
  }

  /** Grants the window; the answer is the new limit. */
  grant(windowBytes: number): number {
    this.#limit = this.limitWith(windowBytes);
    return this.#limit;
  }
}

const nothing = new Uint8Array(0);
