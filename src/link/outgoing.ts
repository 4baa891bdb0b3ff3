/**
 * The sending half of a session, without I/O: what was written, how far it was sent, how far it has arrived.
 *
 *   0 <= acknowledged <= sent <= written,   sent <= limit,   sent - acknowledged <= maxInFlightBytes
 *
 * Bytes are kept by reference until they are acknowledged, but for small pieces, which are packed; a cut moves `sent` back to what has arrived. END counts
 * as one byte behind the last, so that its arrival is acknowledged like any other.
 */
import { KiB } from '../model/units.ts';
import { Packer } from './packer.ts';

export type OutgoingRefusal = 'ack_beyond_sent' | 'ack_backwards';

/** Consecutive bytes to send, as views of what was written. */
export interface Run {
  offset: number;
  lengthBytes: number;
  pieces: Uint8Array[];
}

/** Fully acknowledged chunks are cut off the list in batches, since the cut moves the rest. */
const dropBatch = 256;
const smallBytes = 1 * KiB;

export class Outgoing {
  readonly #maxInFlightBytes: number;
  readonly #packer = new Packer();
  /** The last one may grow. */
  #chunks: Uint8Array[] = [];
  /** The chunk that holds the oldest unacknowledged byte, and its offset in the stream. */
  #head = 0;
  #headOffset = 0;
  /** The chunk that holds the next byte to send, and the offset of its first byte. */
  #cursor = 0;
  #cursorOffset = 0;
  #acknowledged = 0;
  #sent = 0;
  #written = 0;
  #limit = 0;
  #mostSent = 0;
  #resent = 0;
  #ended = false;
  #endSent = false;
  #endAcknowledged = false;

  /** `maxInFlightBytes` bounds what is kept for resending, whatever the receiver grants. */
  constructor(maxInFlightBytes: number) {
    this.#maxInFlightBytes = maxInFlightBytes;
  }

  get acknowledgedBytes(): number {
    return this.#acknowledged;
  }
  get unacknowledgedBytes(): number {
    return this.#sent - this.#acknowledged;
  }
  get unsentBytes(): number {
    return this.#written - this.#sent;
  }
  /** Bytes that were sent at least once, and those that were sent again. */
  get sentBytes(): number {
    return this.#mostSent;
  }
  get resentBytes(): number {
    return this.#resent;
  }
  get endAcknowledged(): boolean {
    return this.#endAcknowledged;
  }
  /** Everything was sent, and END must follow. */
  get endDue(): boolean {
    return this.#ended && !this.#endSent && this.#sent === this.#written;
  }

  /** Appends bytes. They must not change until they have arrived. */
  write(bytes: Uint8Array): void {
    if (this.#ended) throw new Error('Bug: bytes were written to a session after its end');
    if (bytes.length === 0) return;
    if (bytes.length <= smallBytes) this.#packer.append(this.#chunks, bytes);
    else this.#chunks.push(bytes);
    this.#written += bytes.length;
  }

  end(): void {
    this.#ended = true;
  }

  /** How many bytes may be sent now. */
  sendableBytes(): number {
    const most = Math.min(this.#written, this.#limit, this.#acknowledged + this.#maxInFlightBytes);
    return Math.max(0, most - this.#sent);
  }

  /** Takes up to `maxBytes` that may be sent now, and counts them as sent. */
  take(maxBytes: number): Run | undefined {
    const lengthBytes = Math.min(this.sendableBytes(), maxBytes);
    if (lengthBytes <= 0) return undefined;
    const offset = this.#sent;
    const pieces: Uint8Array[] = [];
    while (this.#sent < offset + lengthBytes) {
      const chunk = this.#chunks[this.#cursor]!;
      const from = this.#sent - this.#cursorOffset;
      const piece = chunk.subarray(from, from + offset + lengthBytes - this.#sent);
      if (piece.length === 0) {
        // Only here, not behind its last byte: the last chunk may have grown since.
        this.#cursor += 1;
        this.#cursorOffset += chunk.length;
        continue;
      }
      pieces.push(piece);
      this.#sent += piece.length;
    }
    this.#resent += Math.max(0, Math.min(this.#mostSent, this.#sent) - offset);
    this.#mostSent = Math.max(this.#mostSent, this.#sent);
    return { offset, lengthBytes, pieces };
  }

  /** Where END stands; it counts as sent now. */
  takeEnd(): number {
    this.#endSent = true;
    return this.#written;
  }

  /**
   * The receiver has everything before `received` and lets us send up to `limit`. A limit never moves back: what
   * was granted once stays granted.
   */
  acknowledge(received: number, limit: number): OutgoingRefusal | undefined {
    if (received > this.#sent + (this.#endSent ? 1 : 0)) return 'ack_beyond_sent';
    if (received < this.#acknowledged + (this.#endAcknowledged ? 1 : 0)) return 'ack_backwards';
    if (this.#endSent && received > this.#written) this.#endAcknowledged = true;
    this.#acknowledged = Math.min(received, this.#written);
    this.#limit = Math.max(this.#limit, limit);
    this.#drop();
    return undefined;
  }

  /** A new connection: what the receiver does not have is sent again. */
  resume(received: number, limit: number): OutgoingRefusal | undefined {
    const refused = this.acknowledge(received, limit);
    if (refused) return refused;
    this.#endSent = this.#endAcknowledged;
    this.#sent = this.#acknowledged;
    this.#cursor = this.#head;
    this.#cursorOffset = this.#headOffset;
    return undefined;
  }

  /** Forgets the bytes; the session has failed. */
  clear(): void {
    this.#chunks = [];
    this.#head = this.#cursor = 0;
    this.#sent = this.#written = this.#acknowledged;
  }

  #drop(): void {
    for (;;) {
      const chunk = this.#chunks[this.#head];
      if (chunk === undefined || this.#headOffset + chunk.length > this.#acknowledged) break;
      this.#chunks[this.#head] = nothing;
      this.#head += 1;
      this.#headOffset += chunk.length;
    }
    if (this.#cursor < this.#head) {
      this.#cursor = this.#head;
      this.#cursorOffset = this.#headOffset;
    }
    if (this.#head < dropBatch) return;
    this.#chunks.splice(0, this.#head);
    this.#cursor -= this.#head;
    this.#head = 0;
  }
}

const nothing = new Uint8Array(0);
