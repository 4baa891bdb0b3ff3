/** The return path, from the destination QEMU to the source: answers, requests for pages, bitmaps of what arrived. */
import { ByteQueue } from './byte-queue.ts';
import { answer, bitmapEnd, limits } from './layout.ts';
import { shortString } from './records.ts';
import { streamRefused } from './refusal.ts';

export type Answer =
  /** The destination has ended; 0 means that all is well. */
  | { name: 'shut'; value: number }
  | { name: 'pong'; value: number }
  /** `blockName` is missing when it is that of the request before. */
  | { name: 'request-pages'; startByte: number; bytes: number; blockName?: string }
  /** One bit for each page, the first page in the lowest bit of the first byte. */
  | { name: 'received-bitmap'; blockName: string; bits: Buffer }
  | { name: 'resume-ack'; value: number }
  | { name: 'switchover-ack' };

/** Payload bytes by type, least and most. */
const payloadBytes: Record<number, readonly [number, number]> = {
  [answer.shut]: [4, 4],
  [answer.pong]: [4, 4],
  [answer.requestPagesOf]: [14, 13 + 255],
  [answer.requestPages]: [12, 12],
  [answer.receivedBitmap]: [2, 1 + 255],
  [answer.resumeAck]: [4, 4],
  [answer.switchoverAck]: [0, 0],
};

export class AnswerParser {
  readonly #queue = new ByteQueue();
  readonly #maxBitmapBytes: number;

  /** `maxPages`: how many pages a block may have. */
  constructor(maxPages: number) {
    // QEMU rounds up to whole words.
    this.#maxBitmapBytes = Math.ceil(maxPages / 64) * 8 + 8;
  }

  /** Throws `qemu_failed` for what is no answer. */
  push(bytes: Uint8Array): Answer[] {
    this.#queue.push(bytes);
    const answers: Answer[] = [];
    for (;;) {
      const next = this.#next();
      if (!next) return answers;
      answers.push(next);
    }
  }

  #next(): Answer | undefined {
    const queue = this.#queue;
    const { buffer, start, length } = queue;
    if (length < 4) return undefined;
    const type = buffer.readUInt16BE(start);
    const bytes = buffer.readUInt16BE(start + 2);
    const [least, most] = payloadBytes[type] ?? [1, 0];
    if (bytes < least || bytes > most) throw streamRefused('answer', `${type} with ${bytes} bytes`);
    if (length < 4 + bytes) return undefined;
    const payload = buffer.subarray(start + 4, start + 4 + bytes);
    if (type === answer.receivedBitmap) return this.#bitmap(payload);
    queue.start += 4 + bytes;
    return decode(type, payload);
  }

  #bitmap(payload: Buffer): Answer | undefined {
    const queue = this.#queue;
    const { buffer, start, length } = queue;
    const blockName = nameIn(payload, 0);
    const at = start + 4 + payload.length;
    if (length < 4 + payload.length + 8) return undefined;
    const bytes = buffer.readBigUInt64BE(at);
    if (bytes > this.#maxBitmapBytes) throw streamRefused('length', `bitmap of ${bytes} bytes`);
    const size = Number(bytes);
    if (length < 4 + payload.length + 8 + size + 8) return undefined;
    const mark = buffer.readBigUInt64BE(at + 8 + size);
    if (mark !== bitmapEnd) throw streamRefused('answer', `bitmap ends with ${mark.toString(16)}`);
    const bits = Buffer.from(buffer.subarray(at + 8, at + 8 + size));
    queue.start += 4 + payload.length + 16 + size;
    return { name: 'received-bitmap', blockName, bits };
  }
}

function decode(type: number, payload: Buffer): Answer {
  switch (type) {
    case answer.shut:
      return { name: 'shut', value: payload.readUInt32BE(0) };
    case answer.pong:
      return { name: 'pong', value: payload.readUInt32BE(0) };
    case answer.resumeAck:
      return { name: 'resume-ack', value: payload.readUInt32BE(0) };
    case answer.switchoverAck:
      return { name: 'switchover-ack' };
    default: {
      const start = payload.readBigUInt64BE(0);
      if (start > limits.memoryBytes) throw streamRefused('length', `request at ${start}`);
      const range = { startByte: Number(start), bytes: payload.readUInt32BE(8) };
      if (type === answer.requestPages) return { name: 'request-pages', ...range };
      return { name: 'request-pages', ...range, blockName: nameIn(payload, 12) };
    }
  }
}

function nameIn(payload: Buffer, at: number): string {
  if (payload.length !== at + 1 + payload[at]!) throw streamRefused('answer', 'a name of the wrong length');
  return payload.toString('latin1', at + 1);
}

/** The bytes of an answer, as a destination writes them. */
export function encodeAnswer(given: Answer): Buffer {
  switch (given.name) {
    case 'shut':
      return message(answer.shut, word(given.value));
    case 'pong':
      return message(answer.pong, word(given.value));
    case 'resume-ack':
      return message(answer.resumeAck, word(given.value));
    case 'switchover-ack':
      return message(answer.switchoverAck, Buffer.alloc(0));
    case 'request-pages': {
      const range = Buffer.alloc(12);
      range.writeBigUInt64BE(BigInt(given.startByte));
      range.writeUInt32BE(given.bytes, 8);
      if (given.blockName === undefined) return message(answer.requestPages, range);
      return message(answer.requestPagesOf, Buffer.concat([range, shortString(given.blockName)]));
    }
    case 'received-bitmap': {
      const frame = Buffer.alloc(16);
      frame.writeBigUInt64BE(BigInt(given.bits.length));
      frame.writeBigUInt64BE(bitmapEnd, 8);
      const head = message(answer.receivedBitmap, shortString(given.blockName));
      return Buffer.concat([head, frame.subarray(0, 8), given.bits, frame.subarray(8)]);
    }
  }
}

function message(type: number, payload: Buffer): Buffer {
  const head = Buffer.alloc(4);
  head.writeUInt16BE(type);
  head.writeUInt16BE(payload.length, 2);
  return Buffer.concat([head, payload]);
}

function word(value: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(value);
  return bytes;
}
