/**
 * Bytes to JSON objects, one object per line, without I/O: the framing of QMP and of the guest agent.
 * The other side may be hostile. A line that is too long, not UTF-8, not JSON or not an object is refused with a
 * reason, and after the first refusal the decoder takes nothing any more: what follows cannot be trusted.
 */
export type JsonObject = Record<string, unknown>;

export type LineRefusal = 'too_long' | 'not_utf8' | 'not_json' | 'not_an_object' | 'closed';

export interface Decoded {
  /** The whole objects that came before the refusal, in order. */
  messages: JsonObject[];
  refused?: LineRefusal;
}

const newline = 0x0a;

export class JsonLineDecoder {
  readonly #maxLineBytes: number;
  #parts: Uint8Array[] = [];
  #heldBytes = 0;
  #refused = false;

  constructor(maxLineBytes: number) {
    this.#maxLineBytes = maxLineBytes;
  }

  /** Takes the next bytes of the stream and gives every object that they complete. */
  push(bytes: Uint8Array): Decoded {
    const messages: JsonObject[] = [];
    if (this.#refused) return { messages, refused: 'closed' };
    let start = 0;
    while (start < bytes.length) {
      const end = bytes.indexOf(newline, start);
      const part = bytes.subarray(start, end < 0 ? bytes.length : end);
      if (this.#heldBytes + part.length > this.#maxLineBytes) return this.#refuse(messages, 'too_long');
      if (end < 0) {
        // A copy, since the caller may reuse its buffer (and `Buffer.slice` would not be one).
        this.#parts.push(new Uint8Array(part));
        this.#heldBytes += part.length;
        break;
      }
      const line = this.#parts.length === 0 ? part : Buffer.concat([...this.#parts, part]);
      this.#parts = [];
      this.#heldBytes = 0;
      start = end + 1;
      const message = parseLine(line);
      if (typeof message === 'string') return this.#refuse(messages, message);
      if (message) messages.push(message);
    }
    return { messages };
  }

  #refuse(messages: JsonObject[], refused: LineRefusal): Decoded {
    this.#refused = true;
    this.#parts = [];
    this.#heldBytes = 0;
    return { messages, refused };
  }
}

/** `undefined` for a blank line. */
function parseLine(line: Uint8Array): JsonObject | LineRefusal | undefined {
  let text: string;
  try {
    text = new TextDecoder('utf-8', { fatal: true }).decode(line);
  } catch {
    return 'not_utf8';
  }
  if (text.trim() === '') return undefined;
  try {
    const value: unknown = JSON.parse(text);
    return isObject(value) ? value : 'not_an_object';
  } catch {
    return 'not_json';
  }
}

export const isObject = (value: unknown): value is JsonObject =>
  typeof value === 'object' && value !== null && !Array.isArray(value);

export const encodeLine = (message: JsonObject): string => `${JSON.stringify(message)}\n`;
