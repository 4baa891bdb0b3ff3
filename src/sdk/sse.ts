/**
 * A parser of `text/event-stream` without I/O (HTML standard, section 9.2.6): bytes in, messages out, in
 * whatever pieces the bytes come. Both a line and a message are bounded.
 */
import { ViperError } from './errors.ts';

export interface StreamMessage {
  /** The last id that the stream has set, in this message or before. */
  id: string | undefined;
  event: string;
  data: string;
}

export class EventStreamParser {
  /** How long the server wants a client to wait before it connects again. */
  retryMs: number | undefined;
  readonly #maxLength: number;
  readonly #decoder = new TextDecoder();
  /** Text after the last line end. */
  #rest = '';
  /** The text so far ended with CR: a LF that follows belongs to the same line end. */
  #afterCarriageReturn = false;
  #id: string | undefined;
  /** Counts only when its message is whole: after a cut the message is asked for again. */
  #nextId: string | undefined;
  #event = '';
  #data: string[] = [];
  #dataLength = 0;

  /** `maxLength` bounds a line and the data of a message, in characters. */
  constructor(options: { maxLength?: number } = {}) {
    this.#maxLength = options.maxLength ?? 1024 * 1024;
  }

  /** The last id that the stream has set, even without a message: where to go on after a cut. */
  get lastId(): string | undefined {
    return this.#id;
  }

  /** The messages that these bytes complete. An incomplete one at the end of a stream is never given. */
  push(bytes: Uint8Array): StreamMessage[] {
    let text = this.#decoder.decode(bytes, { stream: true });
    if (this.#afterCarriageReturn && text.startsWith('\n')) text = text.slice(1);
    if (text.length > 0 || bytes.length > 0) this.#afterCarriageReturn = text.endsWith('\r');
    const lines = (this.#rest + text).split(/\r\n|\r|\n/);
    this.#rest = lines.pop() as string;
    this.#check(this.#rest.length);
    const messages: StreamMessage[] = [];
    for (const line of lines) {
      const message = this.#line(line);
      if (message) messages.push(message);
    }
    return messages;
  }

  #line(line: string): StreamMessage | undefined {
    if (line === '') return this.#dispatch();
    const colon = line.indexOf(':');
    if (colon === 0) return; // A comment: a sign of life.
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? '' : line.slice(line[colon + 1] === ' ' ? colon + 2 : colon + 1);
    if (field === 'data') {
      this.#dataLength += value.length + 1;
      this.#check(this.#dataLength);
      this.#data.push(value);
    } else if (field === 'event') {
      this.#event = value;
    } else if (field === 'id' && !value.includes('\0')) {
      this.#nextId = value;
    } else if (field === 'retry' && /^\d{1,9}$/.test(value)) {
      this.retryMs = Number(value);
    }
    return;
  }

  #dispatch(): StreamMessage | undefined {
    this.#id = this.#nextId;
    const message =
      this.#data.length > 0
        ? { id: this.#id, event: this.#event || 'message', data: this.#data.join('\n') }
        : undefined;
    this.#event = '';
    this.#data = [];
    this.#dataLength = 0;
    return message;
  }

  #check(length: number): void {
    if (length <= this.#maxLength) return;
    throw new ViperError(
      'bad_reply',
      `The event stream sent a message of more than ${this.#maxLength} characters; the bound was exceeded`,
    );
  }
}
