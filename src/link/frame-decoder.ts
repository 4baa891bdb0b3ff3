/**
 * Bytes to frames, without I/O.
 *
 * Invariants: a length is judged before a byte of the body is kept, so the decoder never holds more than one small
 * frame; DATA is not held at all but handed out in pieces as it arrives, each with its own offset, as views of the
 * pushed chunk. After the first refusal the decoder takes nothing any more.
 */
import {
  bodyLengths,
  type Frame,
  type FrameType,
  frameTypes,
  headerBytes,
  helloFixedBytes,
  helloKinds,
  offsetBytes,
  refuseReasons,
  secretBytes,
  sessionIdBytes,
} from './frames.ts';
import { type JsonRefusal, parseJson } from './json.ts';

export type FrameRefusal =
  | 'unknown_type'
  | 'bad_length'
  | 'bad_offset'
  | 'bad_value'
  | JsonRefusal
  | 'closed';

export interface DecodedFrames {
  /** The frames that came before the refusal, in order. */
  frames: Frame[];
  refused?: FrameRefusal;
}

export class FrameDecoder {
  #type: FrameType | undefined;
  /** Bytes that are wanted as one piece: a header, a whole small body, or the offset of DATA. */
  #wanted = headerBytes;
  #held: Buffer | undefined;
  #heldBytes = 0;
  #dataOffset = 0;
  #dataLeft = 0;
  #refused = false;

  /** Bytes kept for a frame that is not whole yet. */
  get heldBytes(): number {
    return this.#heldBytes;
  }

  /** Takes the next bytes of the connection. DATA are views of them: use those before the bytes change. */
  push(bytes: Uint8Array): DecodedFrames {
    const frames: Frame[] = [];
    if (this.#refused) return { frames, refused: 'closed' };
    let at = 0;
    while (at < bytes.length) {
      if (this.#dataLeft > 0 && this.#type === undefined) {
        // TLS records are often just that: a chunk of payload and nothing else.
        const isWhole = at === 0 && bytes.length <= this.#dataLeft;
        const piece = isWhole ? bytes : bytes.subarray(at, at + this.#dataLeft);
        frames.push({ type: 'data', offset: this.#dataOffset, bytes: piece });
        this.#dataOffset += piece.length;
        this.#dataLeft -= piece.length;
        at += piece.length;
        continue;
      }
      const taken = Math.min(this.#wanted - this.#heldBytes, bytes.length - at);
      const whole = this.#gather(bytes.subarray(at, at + taken));
      at += taken;
      const outcome = whole && (this.#type === undefined ? this.#takeHeader(whole) : this.#takeBody(whole));
      if (typeof outcome === 'string') {
        this.#refused = true;
        this.#held = undefined;
        this.#heldBytes = 0;
        return { frames, refused: outcome };
      }
      if (outcome) frames.push(outcome);
    }
    return { frames };
  }

  /** The wanted piece, once it is whole. */
  #gather(part: Uint8Array): Buffer | undefined {
    if (this.#heldBytes === 0 && part.length === this.#wanted) {
      return Buffer.from(part.buffer, part.byteOffset, part.length);
    }
    this.#held ??= Buffer.alloc(this.#wanted);
    this.#held.set(part, this.#heldBytes);
    this.#heldBytes += part.length;
    if (this.#heldBytes < this.#wanted) return undefined;
    const whole = this.#held;
    this.#held = undefined;
    this.#heldBytes = 0;
    return whole;
  }

  #takeHeader(header: Buffer): Frame | FrameRefusal | undefined {
    const type = frameTypes[header[0]! - 1];
    if (type === undefined) return 'unknown_type';
    const length = header.readUIntBE(1, 3);
    const [least, most] = bodyLengths[type];
    if (length < least || length > most) return 'bad_length';
    if (length === 0) return { type: 'done' };
    this.#type = type;
    this.#dataLeft = type === 'data' ? length - offsetBytes : 0;
    this.#wanted = length - this.#dataLeft;
    return undefined;
  }

  #takeBody(body: Buffer): Frame | FrameRefusal | undefined {
    const type = this.#type!;
    this.#type = undefined;
    this.#wanted = headerBytes;
    if (type !== 'data') return parseBody(type, body);
    const offset = readOffset(body, 0);
    if (offset === undefined || !Number.isSafeInteger(offset + this.#dataLeft)) return 'bad_offset';
    this.#dataOffset = offset;
    return undefined;
  }
}

function parseBody(type: Exclude<FrameType, 'data'>, body: Buffer): Frame | FrameRefusal {
  switch (type) {
    case 'hello':
      return parseHello(body);
    case 'welcome':
    case 'ack': {
      const received = readOffset(body, 0);
      const limit = readOffset(body, offsetBytes);
      return received === undefined || limit === undefined ? 'bad_offset' : { type, received, limit };
    }
    case 'ping':
    case 'pong':
      return { type, token: body.readUInt32BE(0) };
    case 'end': {
      const offset = readOffset(body, 0);
      // One more must be countable: END itself is acknowledged as if it were a byte.
      return offset === undefined || offset === Number.MAX_SAFE_INTEGER ? 'bad_offset' : { type, offset };
    }
    case 'refuse': {
      const reason = refuseReasons[body[0]! - 1];
      const why = parseWhy(body.subarray(1));
      if (typeof why === 'string') return why;
      return reason === undefined ? 'bad_value' : { type, reason, ...why };
    }
    case 'reset': {
      const why = parseWhy(body);
      return typeof why === 'string' ? why : { type, ...why };
    }
    case 'done':
      return { type };
  }
}

function parseHello(body: Buffer): Frame | FrameRefusal {
  const kind = helloKinds[body[0]! - 1];
  const attempt = body.readUInt32BE(1);
  const idAt = 5;
  const secretAt = idAt + sessionIdBytes;
  const receivedAt = secretAt + secretBytes;
  const received = readOffset(body, receivedAt);
  const limit = readOffset(body, receivedAt + offsetBytes);
  const metadata = parseJson(body.subarray(helloFixedBytes));
  if (kind === undefined) return 'bad_value';
  if (received === undefined || limit === undefined) return 'bad_offset';
  if (typeof metadata === 'string') return metadata;
  return {
    type: 'hello',
    kind,
    attempt,
    sessionId: body.toString('hex', idAt, secretAt),
    secret: new Uint8Array(body.subarray(secretAt, receivedAt)),
    received,
    limit,
    metadata,
  };
}

function parseWhy(bytes: Buffer): { code: string; message: string } | FrameRefusal {
  const why = parseJson(bytes);
  if (typeof why === 'string') return why;
  const { code, message } = why;
  return typeof code === 'string' && typeof message === 'string' ? { code, message } : 'bad_value';
}

/** Undefined for more than a double holds exactly; no stream gets that long. */
function readOffset(body: Buffer, at: number): number | undefined {
  const value = body.readUInt32BE(at) * 2 ** 32 + body.readUInt32BE(at + 4);
  return Number.isSafeInteger(value) ? value : undefined;
}
