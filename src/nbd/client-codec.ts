/**
 * The client's end of an NBD connection, without I/O: it negotiates by itself (structured replies and
 * `base:allocation` where the server has them, then GO), encodes commands and puts their answers together.
 */
import {
  baseAllocation,
  type CommandName,
  chunkDone,
  chunkType,
  commandTypes,
  type ExportInfo,
  type Extent,
  errorNameOf,
  greetingMagic,
  handshakeFlag,
  infoType,
  isOptionError,
  maxErrorTextBytes,
  maxExtents,
  maxNameBytes,
  maxPayloadBytes,
  NbdError,
  nbdRefused,
  option,
  optionMagic,
  optionReply,
  optionReplyMagic,
  requestHeaderBytes,
  requestMagic,
  simpleReplyMagic,
  structuredReplyMagic,
  transmissionFlag,
} from './protocol.ts';
import { type Parser, Pull } from './pull.ts';

export interface Command {
  command: CommandName;
  flags?: number;
  offset?: number;
  lengthBytes?: number;
  payload?: Buffer;
}

/** Exactly one comes for each command. */
export type Answer =
  | { cookie: bigint; error: NbdError }
  | { cookie: bigint; error?: undefined; data?: Buffer; extents?: Extent[] };

export interface ClientHandler {
  send(bytes: Buffer): void;
  /** The negotiation is over: commands may go. */
  ready(info: ExportInfo & { hasAllocation: boolean }): void;
  answer(answer: Answer): void;
}

interface Waiting {
  command: CommandName;
  offset: number;
  lengthBytes: number;
  data: Buffer | undefined;
  /** Bytes of `data` that have come. */
  filledBytes: number;
  extents: Extent[] | undefined;
  error: NbdError | undefined;
}

/** Anything that an option may be answered with. */
const maxOptionReplyBytes = 64 * 1024;
const maxOptionReplies = 64;

export class NbdClientCodec {
  readonly #name: string;
  readonly #handler: ClientHandler;
  readonly #pull: Pull;
  readonly #waiting = new Map<bigint, Waiting>();
  #isStructured = false;
  #allocationId: number | undefined;
  #nextCookie = 1n;

  constructor(exportName: string, handler: ClientHandler) {
    this.#name = exportName;
    this.#handler = handler;
    this.#pull = new Pull(this.#converse());
  }

  /** Commands that have no answer yet. */
  get waiting(): number {
    return this.#waiting.size;
  }

  /** Throws `qemu_failed` when the server does not keep to the protocol, or has no such export. */
  push(bytes: Buffer): void {
    this.#pull.push(bytes);
  }

  /** The bytes of a command, and the cookie that its answer will have. */
  encode({ command, flags = 0, offset = 0, lengthBytes = 0, payload }: Command): {
    cookie: bigint;
    bytes: Buffer[];
  } {
    const cookie = this.#nextCookie++;
    const head = Buffer.alloc(requestHeaderBytes);
    head.writeUInt32BE(requestMagic, 0);
    head.writeUInt16BE(flags, 4);
    head.writeUInt16BE(commandTypes[command], 6);
    head.writeBigUInt64BE(cookie, 8);
    head.writeBigUInt64BE(BigInt(offset), 16);
    head.writeUInt32BE(payload?.length ?? lengthBytes, 24);
    if (command !== 'disconnect') {
      // Zeroed: a server that sends one part twice and another not at all must not uncover our memory.
      const data = command === 'read' ? Buffer.alloc(this.#isStructured ? lengthBytes : 0) : undefined;
      const rest = { filledBytes: 0, extents: undefined, error: undefined };
      this.#waiting.set(cookie, { command, offset, lengthBytes, data, ...rest });
    }
    return { cookie, bytes: payload ? [head, payload] : [head] };
  }

  *#converse(): Parser {
    const greeting = yield 18;
    if (greeting.readBigUInt64BE(0) !== greetingMagic || greeting.readBigUInt64BE(8) !== optionMagic)
      throw nbdRefused('another greeting', 'NBDMAGIC and IHAVEOPT');
    const flags = greeting.readUInt16BE(16);
    if ((flags & handshakeFlag.fixedNewstyle) === 0) throw nbdRefused(`flags ${flags}`, 'fixed newstyle');
    const clientFlags = Buffer.alloc(4);
    clientFlags.writeUInt32BE(flags & (handshakeFlag.fixedNewstyle | handshakeFlag.noZeroes));
    this.#handler.send(clientFlags);
    this.#isStructured = (yield* this.#ask(option.structuredReply, [])) === undefined;
    if (this.#isStructured) yield* this.#askForAllocation();
    const info = yield* this.#go();
    this.#handler.ready({ ...info, hasAllocation: this.#allocationId !== undefined });
    for (;;) yield* this.#reply();
  }

  *#askForAllocation(): Generator<number, void, Buffer> {
    const one = Buffer.from([0, 0, 0, 1]);
    yield* this.#ask(option.setMetaContext, [sized(this.#name), one, sized(baseAllocation)], (type, body) => {
      if (type !== optionReply.metaContext || body.length < 4) return;
      if (body.toString('utf8', 4) === baseAllocation) this.#allocationId = body.readUInt32BE(0);
    });
  }

  *#go(): Generator<number, ExportInfo, Buffer> {
    const info: Partial<ExportInfo> = { minBlockBytes: 1, preferredBlockBytes: 4096, maxPayloadBytes };
    const wish = Buffer.from([0, 1, 0, infoType.blockSize]);
    const error = yield* this.#ask(option.go, [sized(this.#name), wish], (type, body) => {
      if (type !== optionReply.info || body.length < 2) return;
      const kind = body.readUInt16BE(0);
      if (kind === infoType.export && body.length === 12) {
        const size = body.readBigUInt64BE(2);
        if (size > BigInt(Number.MAX_SAFE_INTEGER) / 2n) throw nbdRefused(`size ${size}`, 'a sane one');
        info.sizeBytes = Number(size);
        info.flags = body.readUInt16BE(10);
      }
      if (kind === infoType.blockSize && body.length === 14) {
        info.minBlockBytes = body.readUInt32BE(2);
        info.preferredBlockBytes = body.readUInt32BE(6);
        info.maxPayloadBytes = Math.min(body.readUInt32BE(10), maxPayloadBytes);
      }
    });
    if (error) throw nbdRefused(`a refusal of export '${this.#name}' (${error})`, 'this export');
    const { sizeBytes, flags } = info;
    if (sizeBytes === undefined || flags === undefined || (flags & transmissionFlag.hasFlags) === 0)
      throw nbdRefused('an export without size and flags', 'both');
    return { ...info, sizeBytes, flags } as ExportInfo;
  }

  /** Sends an option and reads its replies. Gives undefined when it was granted, else the words of the refusal. */
  *#ask(
    wanted: number,
    parts: readonly Buffer[],
    onReply: (type: number, body: Buffer) => void = () => {},
  ): Generator<number, string | undefined, Buffer> {
    const data = Buffer.concat(parts);
    const head = Buffer.alloc(16);
    head.writeBigUInt64BE(optionMagic, 0);
    head.writeUInt32BE(wanted, 8);
    head.writeUInt32BE(data.length, 12);
    this.#handler.send(Buffer.concat([head, data]));
    for (let count = 0; count < maxOptionReplies; count += 1) {
      const reply = yield 20;
      const type = reply.readUInt32BE(12);
      const lengthBytes = reply.readUInt32BE(16);
      if (reply.readBigUInt64BE(0) !== optionReplyMagic || reply.readUInt32BE(8) !== wanted)
        throw nbdRefused('bytes that answer no option', `an answer to option ${wanted}`);
      if (lengthBytes > maxOptionReplyBytes)
        throw nbdRefused(`an answer of ${lengthBytes} bytes`, `${maxOptionReplyBytes} at most`);
      const body = yield lengthBytes;
      if (isOptionError(type))
        return `0x${type.toString(16)} ${body.toString('utf8', 0, Math.min(body.length, maxNameBytes))}`;
      if (type === optionReply.ack) return undefined;
      onReply(type, body);
    }
    throw nbdRefused(`${maxOptionReplies} answers to one option`, 'an end');
  }

  *#reply(): Parser {
    const head = yield 16;
    const magic = head.readUInt32BE(0);
    const cookie = head.readBigUInt64BE(8);
    const waiting = this.#waiting.get(cookie);
    if (!waiting) throw nbdRefused(`an answer to ${cookie}`, 'one that was asked');
    if (magic === simpleReplyMagic) {
      const error = head.readUInt32BE(4);
      if (error !== 0) waiting.error = new NbdError(errorNameOf(error), `${waiting.command} failed`);
      else if (waiting.command === 'read') {
        if (this.#isStructured) throw nbdRefused('a simple answer to a read', 'a structured one');
        waiting.data = yield waiting.lengthBytes;
        waiting.filledBytes = waiting.lengthBytes;
      }
      return this.#answer(cookie, waiting);
    }
    if (magic !== structuredReplyMagic || !this.#isStructured)
      throw nbdRefused('bytes that begin no answer', 'the magic of one');
    const lengthBytes = (yield 4).readUInt32BE(0);
    yield* this.#chunk(waiting, head.readUInt16BE(6), lengthBytes);
    if ((head.readUInt16BE(4) & chunkDone) !== 0) this.#answer(cookie, waiting);
  }

  *#chunk(waiting: Waiting, type: number, lengthBytes: number): Parser {
    const most = type === chunkType.offsetData ? 8 + waiting.lengthBytes : 4 + maxExtents * 8;
    if (lengthBytes > most) throw nbdRefused(`a chunk of ${lengthBytes} bytes`, `${most} at most`);
    const body = yield lengthBytes;
    const { command, data } = waiting;
    if (type === chunkType.none && lengthBytes === 0) return;
    if (type === chunkType.offsetData && data && lengthBytes > 8) {
      body.copy(data, this.#place(waiting, body, lengthBytes - 8), 8);
    } else if (type === chunkType.offsetHole && data && lengthBytes === 12) {
      const bytes = body.readUInt32BE(8);
      const at = this.#place(waiting, body, bytes);
      data.fill(0, at, at + bytes);
    } else if (type === chunkType.blockStatus && command === 'blockStatus' && lengthBytes >= 12) {
      waiting.extents = parseExtents(body, this.#allocationId);
    } else if ((type & 0x8000) !== 0 && lengthBytes >= 6) {
      const textBytes = Math.min(body.readUInt16BE(4), maxErrorTextBytes, lengthBytes - 6);
      const text = body.toString('utf8', 6, 6 + textBytes);
      waiting.error = new NbdError(errorNameOf(body.readUInt32BE(0)), `${command} failed: ${text}`);
    } else
      throw nbdRefused(`a chunk of type ${type} with ${lengthBytes} bytes for ${command}`, 'a fitting one');
  }

  /** Where in the data of a read a chunk lies. */
  #place(waiting: Waiting, body: Buffer, bytes: number): number {
    const at = Number(body.readBigUInt64BE(0)) - waiting.offset;
    if (at < 0 || at + bytes > waiting.lengthBytes)
      throw nbdRefused(`${bytes} bytes at ${at} of a read of ${waiting.lengthBytes}`, 'bytes inside it');
    waiting.filledBytes += bytes;
    return at;
  }

  #answer(cookie: bigint, { command, data, filledBytes, lengthBytes, extents, error }: Waiting): void {
    this.#waiting.delete(cookie);
    if (error) {
      this.#handler.answer({ cookie, error });
      return;
    }
    if (command === 'read' && filledBytes !== lengthBytes)
      throw nbdRefused(`${filledBytes} bytes for a read of ${lengthBytes}`, 'all of them, each once');
    if (command === 'blockStatus' && !extents) throw nbdRefused('no status', 'one for block status');
    this.#handler.answer({ cookie, ...(data && { data }), ...(extents && { extents }) });
  }
}

function parseExtents(body: Buffer, allocationId: number | undefined): Extent[] {
  if (body.readUInt32BE(0) !== allocationId || body.length % 8 !== 4)
    throw nbdRefused('a status of something else', baseAllocation);
  const extents: Extent[] = [];
  for (let at = 4; at < body.length; at += 8) {
    const lengthBytes = body.readUInt32BE(at);
    if (lengthBytes === 0) throw nbdRefused('an extent of 0 bytes', 'more');
    extents.push({ lengthBytes, flags: body.readUInt32BE(at + 4) });
  }
  return extents;
}

function sized(text: string): Buffer {
  const bytes = Buffer.from(text);
  const head = Buffer.alloc(4);
  head.writeUInt32BE(bytes.length);
  return Buffer.concat([head, bytes]);
}
