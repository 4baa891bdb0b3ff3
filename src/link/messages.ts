/**
 * JSON messages over a session, for control protocols: a length of four bytes, then that many bytes of JSON, an
 * object each. The session stays the caller's: it is neither ended nor destroyed by reading.
 */
import type { Duplex } from 'node:stream';
import { AppError } from '../model/errors.ts';
import { MiB } from '../model/units.ts';
import { protocolError } from './errors.ts';
import { type JsonObject, type JsonRefusal, parseJson } from './json.ts';

const lengthBytes = 4;
const defaultMaxBytes = 1 * MiB;

export type MessageRefusal = 'too_long' | 'closed' | JsonRefusal;

export interface DecodedMessages {
  /** The whole messages that came before the refusal, in order. */
  messages: JsonObject[];
  refused?: MessageRefusal;
}

/** Bytes to messages, without I/O. It holds less than one message, and nothing after a refusal. */
export class MessageDecoder {
  readonly #maxBytes: number;
  /** The length or the body that is being collected; filled by copying, so that no chunk is kept. */
  #collected = Buffer.alloc(lengthBytes);
  #collectedBytes = 0;
  #inBody = false;
  #refused = false;

  constructor(maxBytes = defaultMaxBytes) {
    this.#maxBytes = maxBytes;
  }

  /** A message has begun and is not whole. */
  get isMidMessage(): boolean {
    return this.#collectedBytes > 0 || this.#inBody;
  }

  push(bytes: Uint8Array): DecodedMessages {
    const messages: JsonObject[] = [];
    if (this.#refused) return { messages, refused: 'closed' };
    let at = 0;
    while (at < bytes.length) {
      const part = bytes.subarray(at, at + this.#collected.length - this.#collectedBytes);
      this.#collected.set(part, this.#collectedBytes);
      this.#collectedBytes += part.length;
      at += part.length;
      if (this.#collectedBytes < this.#collected.length) break;
      const outcome = this.#take(this.#collected);
      if (typeof outcome === 'string') {
        this.#refused = true;
        return { messages, refused: outcome };
      }
      if (outcome) messages.push(outcome);
    }
    return { messages };
  }

  #take(whole: Buffer): JsonObject | MessageRefusal | undefined {
    const nextBytes = this.#inBody ? lengthBytes : whole.readUInt32BE(0);
    if (nextBytes > this.#maxBytes) return 'too_long';
    if (nextBytes === 0) return 'not_json';
    this.#collected = Buffer.alloc(nextBytes);
    this.#collectedBytes = 0;
    this.#inBody = !this.#inBody;
    return this.#inBody ? undefined : parseJson(whole);
  }
}

/** Errors: `payload_too_large`. */
export function encodeMessage(message: JsonObject, maxBytes = defaultMaxBytes): Buffer {
  const text = Buffer.from(JSON.stringify(message));
  if (text.length > maxBytes) {
    throw new AppError(
      'payload_too_large',
      `A message has ${text.length} bytes, and ${maxBytes} is the most`,
      {
        sizeBytes: text.length,
        maxBytes,
      },
    );
  }
  const length = Buffer.alloc(lengthBytes);
  length.writeUInt32BE(text.length);
  return Buffer.concat([length, text]);
}

/**
 * Both directions of a session as messages. Iterating gives each message once and ends with the stream; leaving a
 * loop loses nothing, the next one goes on behind. One reader at a time. Errors while reading: those of the
 * session, and `peer_unreachable` with reason `protocol` for bytes that are no message.
 */
export interface Messages extends AsyncIterableIterator<JsonObject, undefined, undefined> {
  /** Resolves when the session has taken the message and there is room for more. Errors: those of the session. */
  send(message: JsonObject): Promise<void>;
  /** No more messages from us. Resolves when the peer has them all. */
  end(): Promise<void>;
}

export function messages(session: Duplex, options: { maxBytes?: number } = {}): Messages {
  const decoder = new MessageDecoder(options.maxBytes);
  const ready: JsonObject[] = [];
  let refused: AppError | undefined;
  const chunks = session.iterator({ destroyOnReturn: false }) as AsyncIterableIterator<Buffer>;

  return {
    async next() {
      for (;;) {
        const message = ready.shift();
        if (message) return { value: message, done: false };
        if (refused) throw refused;
        const chunk = await chunks.next();
        if (chunk.done) {
          if (decoder.isMidMessage) throw protocolError('its stream ends within a message');
          return { value: undefined, done: true };
        }
        const decoded = decoder.push(chunk.value);
        ready.push(...decoded.messages);
        if (decoded.refused) refused = protocolError(`its message was refused: ${decoded.refused}`);
      }
    },
    async return() {
      return { value: undefined, done: true };
    },
    send: (message) =>
      new Promise((resolve, reject) => {
        const bytes = encodeMessage(message, options.maxBytes);
        session.write(bytes, (error) => (error ? reject(session.errored ?? error) : resolve()));
      }),
    end: () =>
      new Promise((resolve, reject) => {
        session.end((error?: Error | null) => (error ? reject(session.errored ?? error) : resolve()));
      }),
    [Symbol.asyncIterator]() {
      return this;
    },
  };
}
