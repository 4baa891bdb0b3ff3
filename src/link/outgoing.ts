/**
 * The sending half of a session, without I/O: what was written, how far it was sent, how far it has arrived.
 *
 *   0 <= acknowledged <= sent <= written,   sent <= limit,   sent - acknowledged <= maxInFlightBytes
 *
 * Bytes lie in blocks until they are acknowledged; a cut moves `sent` back to what has arrived. END counts as one byte
 * behind the last, so that its arrival is acknowledged like any other.
 */
import { BlockPool } from './blocks.ts';
import { dataHeaderBytes } from './frames.ts';

export type OutgoingRefusal = 'ack_beyond_sent' | 'ack_backwards';

/** Consecutive bytes to send, where they lie. */
export interface Run {
  offset: number;
  bytes: Uint8Array;
  /** The same with room for the header of a frame in front. */
  withRoom: Buffer | undefined;
}

/** In front is room for a header, so that a whole block is a frame and needs one write. */
interface Block {
  memory: Buffer;
  /** Of its first byte in the stream. */
  offset: number;
  lengthBytes: number;
}

export class Outgoing {
  readonly #maxInFlightBytes: number;
  readonly #pool = new BlockPool();
  /** Oldest first. */
  #blocks: Block[] = [];
  /** The block that holds the next byte to send. */
  #cursor = 0;
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

  /** Where the next bytes may be put; `fill` then says how many were. Never empty. */
  room(): Uint8Array {
    let last = this.#blocks.at(-1);
    if (!last || dataHeaderBytes + last.lengthBytes === last.memory.length) {
      last = { memory: this.#pool.take(), offset: this.#written, lengthBytes: 0 };
      this.#blocks.push(last);
    }
    return last.memory.subarray(dataHeaderBytes + last.lengthBytes);
  }

  /** So many bytes were put into `room`. */
  fill(lengthBytes: number): void {
    if (this.#ended) throw new Error('Bug: bytes were written to a session after its end');
    // The session has ended meanwhile, and forgot its blocks.
    if (this.#blocks.length === 0) return;
    this.#blocks.at(-1)!.lengthBytes += lengthBytes;
    this.#written += lengthBytes;
  }

  /** Appends a copy of the bytes. */
  write(bytes: Uint8Array): void {
    for (let at = 0; at < bytes.length; ) {
      const room = this.room();
      const part = bytes.subarray(at, at + room.length);
      room.set(part);
      this.fill(part.length);
      at += part.length;
    }
  }

  end(): void {
    this.#ended = true;
  }

  /** How many bytes may be sent now. */
  sendableBytes(): number {
    const most = Math.min(this.#written, this.#limit, this.#acknowledged + this.#maxInFlightBytes);
    return Math.max(0, most - this.#sent);
  }

  /** Takes up to `maxBytes` that may be sent now and lie in one piece, and counts them as sent. */
  take(maxBytes: number): Run | undefined {
    const mostBytes = Math.min(this.sendableBytes(), maxBytes);
    if (mostBytes <= 0) return undefined;
    const offset = this.#sent;
    // Only here, not behind its last byte: the last block may have grown since.
    while (offset >= endOf(this.#blocks[this.#cursor]!)) this.#cursor += 1;
    const block = this.#blocks[this.#cursor]!;
    const start = dataHeaderBytes + offset - block.offset;
    const end = dataHeaderBytes + Math.min(block.lengthBytes, offset - block.offset + mostBytes);
    const bytes = block.memory.subarray(start, end);
    const withRoom = start === dataHeaderBytes ? block.memory.subarray(0, end) : undefined;
    this.#sent += bytes.length;
    this.#resent += Math.max(0, Math.min(this.#mostSent, this.#sent) - offset);
    this.#mostSent = Math.max(this.#mostSent, this.#sent);
    return { offset, bytes, withRoom };
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
    this.#cursor = 0;
    return undefined;
  }

  /** Forgets the bytes; the session has failed. */
  clear(): void {
    this.#blocks = [];
    this.#cursor = 0;
    this.#sent = this.#written = this.#acknowledged;
  }

  /** Blocks that have arrived are used again, but not the last one: it may grow, or be filled at this moment. */
  #drop(): void {
    let gone = 0;
    while (gone < this.#blocks.length - 1 && endOf(this.#blocks[gone]!) <= this.#acknowledged) {
      this.#pool.give(this.#blocks[gone]!.memory);
      gone += 1;
    }
    this.#blocks.splice(0, gone);
    this.#cursor = Math.max(0, this.#cursor - gone);
  }
}

const endOf = ({ offset, lengthBytes }: Block): number => offset + lengthBytes;
