/** Frames between a relay and those who keep slabs with it. No I/O. FORMAT.md is the page of it. */
import { AppError } from '../model/errors.ts';
import type { Uuid } from '../model/ids.ts';
import { KiB, MiB } from '../model/units.ts';
import { ByteQueue } from '../stream/index.ts';

export const frame = {
  // From the client.
  put: 1,
  get: 2,
  drop: 3,
  pass: 4,
  expect: 5,
  share: 6,
  keep: 7,
  // From the relay.
  free: 64,
  held: 65,
  full: 66,
  slab: 67,
  absent: 68,
  passed: 69,
  here: 70,
  kept: 71,
} as const;

export type ClientFrame =
  /** `bytes` are valid until the next push. */
  | { name: 'put'; slab: number; bytes: Buffer }
  /** So many bytes from `at` on; the relay answers with the same `tag`. */
  | { name: 'get'; tag: number; slab: number; urgent: boolean; at: number; length: number }
  | { name: 'drop' }
  /** The slab, which is in a PUT before this, is to be given to that relay as well. */
  | { name: 'pass'; slab: number; to: Uuid }
  /** The relay is to say when it has a slab with this SHA-256, by whatever session it comes. */
  | { name: 'expect'; slab: number; digest: Buffer }
  /** What the group with this secret (32 bytes in hex) has under this number is to be this one's, too. */
  | { name: 'share'; slab: number; group: string }
  /** The group is to outlive its last session by as long as any may. */
  | { name: 'keep' };

export type RelayFrame =
  /** `canShare`: it knows SHARE. Said to those who know that it may be said. */
  | { name: 'free'; freeBytes: number; canShare?: boolean }
  | { name: 'held'; slab: number; freeBytes: number }
  | { name: 'full'; slab: number; freeBytes: number }
  /** `bytes` are valid until the next push. */
  | { name: 'slab'; tag: number; bytes: Buffer }
  | { name: 'absent'; tag: number }
  /** Whether that relay has taken it. */
  | { name: 'passed'; slab: number; to: Uuid; isTaken: boolean }
  /** Whether it is what was expected; if not, it is not held. */
  | { name: 'here'; slab: number; isRight: boolean; freeBytes: number }
  | { name: 'kept' };

export const maxSlabBytes = MiB + 256 * KiB;
const headBytes = 5;
const idBytes = 16;
/** Of SHA-256. */
export const slabDigestBytes = 32;
/** Of what shows a relay the right to a group. */
export const groupBytes = 32;

/** Bytes of the body by type, least and most. */
const bodyBytes: Record<number, readonly [number, number]> = {
  [frame.put]: [5, 4 + maxSlabBytes],
  [frame.get]: [17, 17],
  [frame.drop]: [0, 0],
  [frame.pass]: [4 + idBytes, 4 + idBytes],
  [frame.expect]: [4 + slabDigestBytes, 4 + slabDigestBytes],
  [frame.share]: [4 + groupBytes, 4 + groupBytes],
  [frame.keep]: [0, 0],
  [frame.free]: [8, 9],
  [frame.held]: [12, 12],
  [frame.full]: [12, 12],
  [frame.slab]: [5, 4 + maxSlabBytes],
  [frame.absent]: [4, 4],
  [frame.passed]: [5 + idBytes, 5 + idBytes],
  [frame.here]: [13, 13],
  [frame.kept]: [0, 0],
};
const fromClient = new Set<number>([
  frame.put,
  frame.get,
  frame.drop,
  frame.pass,
  frame.expect,
  frame.share,
  frame.keep,
]);

/** In pieces, so that a slab is not copied. They are the link's from then on. */
export function encodeFrame(given: ClientFrame | RelayFrame): Uint8Array[] {
  switch (given.name) {
    case 'put':
      return [head(frame.put, 4 + given.bytes.length, word(given.slab)), given.bytes];
    case 'slab':
      return [head(frame.slab, 4 + given.bytes.length, word(given.tag)), given.bytes];
    case 'get': {
      const { tag, slab, urgent, at, length } = given;
      return [head(frame.get, 17, word(tag), word(slab), flag(urgent), word(at), word(length))];
    }
    case 'drop':
    case 'keep':
    case 'kept':
      return [head(frame[given.name], 0)];
    case 'absent':
      return [head(frame.absent, 4, word(given.tag))];
    case 'pass':
      return [head(frame.pass, 4 + idBytes, word(given.slab), bytesOfId(given.to))];
    case 'passed': {
      const { slab, to, isTaken } = given;
      return [head(frame.passed, 5 + idBytes, word(slab), bytesOfId(to), flag(isTaken))];
    }
    case 'expect':
      return [head(frame.expect, 4 + slabDigestBytes, word(given.slab), given.digest)];
    case 'share':
      return [head(frame.share, 4 + groupBytes, word(given.slab), Buffer.from(given.group, 'hex'))];
    case 'here':
      return [head(frame.here, 13, word(given.slab), flag(given.isRight), long(given.freeBytes))];
    case 'free':
      return given.canShare === undefined
        ? [head(frame.free, 8, long(given.freeBytes))]
        : [head(frame.free, 9, long(given.freeBytes), flag(given.canShare))];
    case 'held':
    case 'full':
      return [head(frame[given.name], 12, word(given.slab), long(given.freeBytes))];
  }
}

/** Reads what one of the two sides sends. A frame's bytes are valid until the next push. */
export class FrameReader<Side extends 'client' | 'relay'> {
  readonly #queue = new ByteQueue();
  readonly #side: Side;

  constructor(side: Side) {
    this.#side = side;
  }

  push(bytes: Uint8Array): void {
    this.#queue.push(bytes);
  }

  /** The next whole frame; `undefined` while it is not all there. Throws for one that cannot be. */
  next(): (Side extends 'client' ? ClientFrame : RelayFrame) | undefined {
    const queue = this.#queue;
    const { buffer, start, length } = queue;
    if (length < headBytes) return undefined;
    const type = buffer[start]!;
    const bytes = buffer.readUInt32BE(start + 1);
    const [least, most] = bodyBytes[type] ?? [1, 0];
    if (fromClient.has(type) !== (this.#side === 'client') || bytes < least || bytes > most)
      throw relayError(`a frame of type ${type} with ${bytes} bytes`);
    if (length < headBytes + bytes) return undefined;
    queue.start += headBytes + bytes;
    const body = buffer.subarray(start + headBytes, start + headBytes + bytes);
    return decode(type, body) as Side extends 'client' ? ClientFrame : RelayFrame;
  }
}

function decode(type: number, body: Buffer): ClientFrame | RelayFrame {
  switch (type) {
    case frame.put:
      return { name: 'put', slab: slabOf(body), bytes: body.subarray(4) };
    case frame.slab:
      return { name: 'slab', tag: body.readUInt32BE(0), bytes: body.subarray(4) };
    case frame.get:
      return get(body);
    case frame.drop:
      return { name: 'drop' };
    case frame.keep:
      return { name: 'keep' };
    case frame.kept:
      return { name: 'kept' };
    case frame.pass:
      return { name: 'pass', slab: slabOf(body), to: idOf(body, 4) };
    case frame.passed: {
      const isTaken = truth(body, 4 + idBytes);
      return { name: 'passed', slab: slabOf(body), to: idOf(body, 4), isTaken };
    }
    case frame.expect:
      return { name: 'expect', slab: slabOf(body), digest: Buffer.from(body.subarray(4)) };
    case frame.share:
      return { name: 'share', slab: slabOf(body), group: body.toString('hex', 4) };
    case frame.here:
      return { name: 'here', slab: slabOf(body), isRight: truth(body, 4), freeBytes: size(body, 5) };
    case frame.absent:
      return { name: 'absent', tag: body.readUInt32BE(0) };
    case frame.free:
      return { name: 'free', freeBytes: size(body, 0), ...(body.length > 8 && { canShare: truth(body, 8) }) };
    default:
      return { name: type === frame.held ? 'held' : 'full', slab: slabOf(body), freeBytes: size(body, 4) };
  }
}

function get(body: Buffer): ClientFrame {
  const [at, length] = [body.readUInt32BE(9), body.readUInt32BE(13)];
  if (length === 0 || at + length > maxSlabBytes) throw relayError(`a get of ${length} bytes from ${at}`);
  return {
    name: 'get',
    tag: body.readUInt32BE(0),
    slab: slabOf(body, 4),
    urgent: truth(body, 8),
    at,
    length,
  };
}

function slabOf(body: Buffer, from = 0): number {
  const slab = body.readUInt32BE(from);
  if (slab === 0) throw relayError('slab 0');
  return slab;
}

function truth(body: Buffer, at: number): boolean {
  if (body[at]! > 1) throw relayError(`${body[at]} for a yes or no`);
  return body[at] === 1;
}

const flag = (value: boolean): Buffer => Buffer.of(Number(value));

const bytesOfId = (id: Uuid): Buffer => Buffer.from(id.replaceAll('-', ''), 'hex');

const idOf = (body: Buffer, at: number): Uuid =>
  body.toString('hex', at, at + idBytes).replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, '$1-$2-$3-$4-$5');

function size(body: Buffer, at: number): number {
  const bytes = body.readBigUInt64BE(at);
  if (bytes > Number.MAX_SAFE_INTEGER) throw relayError(`${bytes} free bytes`);
  return Number(bytes);
}

function head(type: number, bytes: number, ...fields: Buffer[]): Buffer {
  const start = Buffer.alloc(headBytes);
  start[0] = type;
  start.writeUInt32BE(bytes, 1);
  return Buffer.concat([start, ...fields]);
}

function word(value: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(value);
  return bytes;
}

function long(value: number): Buffer {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64BE(BigInt(Math.max(0, Math.floor(value))));
  return bytes;
}

/** The other end broke the protocol. */
export const relayError = (found: string): AppError =>
  new AppError('peer_unreachable', `The other end of a relay's session sent ${found}`, {
    reason: 'protocol',
  });
