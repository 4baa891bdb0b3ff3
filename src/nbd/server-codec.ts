/**
 * The server's end of an NBD connection, without I/O: bytes of the client become requests, answers become bytes.
 * Negotiation (fixed newstyle) is answered here; it ends when the client has chosen the one export that there is.
 */
import {
  baseAllocation,
  type CommandName,
  chunkDone,
  chunkType,
  commandFlag,
  commandNames,
  commandTypes,
  type ExportInfo,
  type Extent,
  greetingMagic,
  handshakeFlag,
  infoType,
  maxErrorTextBytes,
  maxNameBytes,
  maxOptionBytes,
  maxOptions,
  type NbdErrorName,
  nbdErrors,
  nbdRefused,
  option,
  optionMagic,
  optionReply,
  optionReplyMagic,
  requestHeaderBytes,
  requestMagic,
  simpleReplyMagic,
  structuredReplyMagic,
} from './protocol.ts';
import { type Parser, Pull } from './pull.ts';

export interface NbdRequest {
  command: CommandName;
  /** `commandFlag` bits. */
  flags: number;
  cookie: bigint;
  offset: number;
  lengthBytes: number;
  /** Of a write; valid as long as the caller likes. */
  payload: Buffer | undefined;
}

export interface ServerHandler {
  send(bytes: Buffer): void;
  request(request: NbdRequest): void;
  /** The client takes its leave. */
  end(): void;
}

const allocationId = 1;

export class NbdServerCodec {
  readonly #export: { name: string; info: ExportInfo };
  readonly #handler: ServerHandler;
  readonly #pull: Pull;
  #isStructured = false;
  #knowsAllocation = false;

  /** The greeting goes out at once. */
  constructor(served: { name: string; info: ExportInfo }, handler: ServerHandler) {
    this.#export = served;
    this.#handler = handler;
    this.#pull = new Pull(this.#converse());
  }

  get heldBytes(): number {
    return this.#pull.heldBytes;
  }

  /** Throws `qemu_failed` when the client does not keep to the protocol; then the connection is to be closed. */
  push(bytes: Buffer): void {
    this.#pull.push(bytes);
  }

  // --- answers

  ok(request: NbdRequest): Buffer {
    return this.#isStructured ? chunk(request, chunkType.none, []) : simple(request, 0);
  }

  data(request: NbdRequest, bytes: Buffer): Buffer[] {
    if (!this.#isStructured) return [simple(request, 0), bytes];
    const head = Buffer.alloc(8);
    head.writeBigUInt64BE(BigInt(request.offset));
    return [chunkHeader(request, chunkType.offsetData, 8 + bytes.length), head, bytes];
  }

  /** At most `maxExtents`; the first alone where the client wants just one. */
  status(request: NbdRequest, extents: readonly Extent[]): Buffer {
    const told = (request.flags & commandFlag.reqOne) !== 0 ? extents.slice(0, 1) : extents;
    const body = Buffer.alloc(4 + told.length * 8);
    body.writeUInt32BE(allocationId, 0);
    told.forEach(({ lengthBytes, flags }, i) => {
      body.writeUInt32BE(lengthBytes, 4 + i * 8);
      body.writeUInt32BE(flags, 8 + i * 8);
    });
    return chunk(request, chunkType.blockStatus, [body]);
  }

  error(request: NbdRequest, name: NbdErrorName, message: string): Buffer {
    if (!this.#isStructured) return simple(request, nbdErrors[name]);
    const text = Buffer.from(message).subarray(0, maxErrorTextBytes);
    const head = Buffer.alloc(6);
    head.writeUInt32BE(nbdErrors[name], 0);
    head.writeUInt16BE(text.length, 4);
    return chunk(request, chunkType.error, [head, text]);
  }

  // --- the conversation

  *#converse(): Parser {
    const greeting = Buffer.alloc(18);
    greeting.writeBigUInt64BE(greetingMagic, 0);
    greeting.writeBigUInt64BE(optionMagic, 8);
    greeting.writeUInt16BE(handshakeFlag.fixedNewstyle | handshakeFlag.noZeroes, 16);
    this.#handler.send(greeting);
    const flags = (yield 4).readUInt32BE(0);
    if ((flags & 1) === 0 || flags > 3) throw nbdRefused(`client flags ${flags}`, 'fixed newstyle');
    for (let count = 0; ; count += 1) {
      if (count === maxOptions) throw nbdRefused(`${count} options`, 'an export');
      const head = yield 16;
      const wanted = head.readUInt32BE(8);
      const lengthBytes = head.readUInt32BE(12);
      if (head.readBigUInt64BE(0) !== optionMagic) throw nbdRefused('bytes that begin no option', 'IHAVEOPT');
      if (lengthBytes > maxOptionBytes)
        throw nbdRefused(`an option of ${lengthBytes} bytes`, `${maxOptionBytes} at most`);
      const data = yield lengthBytes;
      const outcome = this.#option(wanted, data, (flags & handshakeFlag.noZeroes) !== 0);
      if (outcome === 'end') return this.#handler.end();
      if (outcome === 'transmit') break;
    }
    yield* this.#requests();
  }

  *#requests(): Parser {
    for (;;) {
      const head = yield requestHeaderBytes;
      if (head.readUInt32BE(0) !== requestMagic) throw nbdRefused('bytes that begin no request', 'the magic');
      const type = head.readUInt16BE(6);
      const command = commandNames.find((name) => commandTypes[name] === type);
      if (!command) throw nbdRefused(`command ${type}`, 'a known one');
      if (command === 'disconnect') return this.#handler.end();
      const offset = head.readBigUInt64BE(16);
      const lengthBytes = head.readUInt32BE(24);
      if (offset > BigInt(Number.MAX_SAFE_INTEGER) / 2n) throw nbdRefused(`offset ${offset}`, 'a sane one');
      const { maxPayloadBytes } = this.#export.info;
      if ((command === 'read' || command === 'write') && lengthBytes > maxPayloadBytes)
        throw nbdRefused(`a ${command} of ${lengthBytes} bytes`, `${maxPayloadBytes} at most`);
      const payload = command === 'write' ? yield lengthBytes : undefined;
      if (command === 'blockStatus' && !this.#knowsAllocation)
        throw nbdRefused('a question for block status', 'a metadata context first');
      const flags = head.readUInt16BE(4);
      this.#handler.request({
        command,
        flags,
        cookie: head.readBigUInt64BE(8),
        offset: Number(offset),
        lengthBytes,
        payload,
      });
    }
  }

  #option(wanted: number, data: Buffer, noZeroes: boolean): 'go on' | 'transmit' | 'end' {
    const reply = (type: number, body: Buffer = Buffer.alloc(0)) =>
      this.#handler.send(optionAnswer(wanted, type, body));
    switch (wanted) {
      case option.exportName: {
        // This option has no way to say no.
        if (data.toString() !== this.#export.name) throw nbdRefused(`export '${data}'`, this.#export.name);
        const body = Buffer.alloc(noZeroes ? 10 : 134);
        body.writeBigUInt64BE(BigInt(this.#export.info.sizeBytes), 0);
        body.writeUInt16BE(this.#export.info.flags, 8);
        this.#handler.send(body);
        return 'transmit';
      }
      case option.abort:
        reply(optionReply.ack);
        return 'end';
      case option.list: {
        if (data.length > 0) reply(optionReply.errInvalid);
        else {
          reply(optionReply.server, sized(this.#export.name));
          reply(optionReply.ack);
        }
        return 'go on';
      }
      case option.info:
      case option.go: {
        const asked = parseInfo(data);
        if (!asked) reply(optionReply.errInvalid);
        else if (asked.name !== this.#export.name) reply(optionReply.errUnknown);
        else {
          for (const body of infosOf(this.#export.info)) reply(optionReply.info, body);
          reply(optionReply.ack);
          if (wanted === option.go) return 'transmit';
        }
        return 'go on';
      }
      case option.structuredReply:
        if (data.length > 0) reply(optionReply.errInvalid);
        else {
          this.#isStructured = true;
          reply(optionReply.ack);
        }
        return 'go on';
      case option.listMetaContext:
      case option.setMetaContext: {
        const asked = parseContexts(data);
        if (!asked || !this.#isStructured) reply(optionReply.errInvalid);
        else if (asked.name !== this.#export.name) reply(optionReply.errUnknown);
        else {
          const isSet = wanted === option.setMetaContext;
          const isKnown = (query: string) => query === baseAllocation || (!isSet && query === 'base:');
          const isWanted = asked.queries.some(isKnown) || (!isSet && asked.queries.length === 0);
          if (isSet) this.#knowsAllocation = isWanted;
          const id = Buffer.alloc(4);
          id.writeUInt32BE(allocationId);
          if (isWanted) reply(optionReply.metaContext, Buffer.concat([id, Buffer.from(baseAllocation)]));
          reply(optionReply.ack);
        }
        return 'go on';
      }
      default:
        reply(optionReply.errUnsupported);
        return 'go on';
    }
  }
}

function optionAnswer(wanted: number, type: number, body: Buffer): Buffer {
  const head = Buffer.alloc(20);
  head.writeBigUInt64BE(optionReplyMagic, 0);
  head.writeUInt32BE(wanted, 8);
  head.writeUInt32BE(type, 12);
  head.writeUInt32BE(body.length, 16);
  return Buffer.concat([head, body]);
}

function infosOf(info: ExportInfo): Buffer[] {
  const about = Buffer.alloc(12);
  about.writeUInt16BE(infoType.export, 0);
  about.writeBigUInt64BE(BigInt(info.sizeBytes), 2);
  about.writeUInt16BE(info.flags, 10);
  const sizes = Buffer.alloc(14);
  sizes.writeUInt16BE(infoType.blockSize, 0);
  sizes.writeUInt32BE(info.minBlockBytes, 2);
  sizes.writeUInt32BE(info.preferredBlockBytes, 6);
  sizes.writeUInt32BE(info.maxPayloadBytes, 10);
  return [about, sizes];
}

/** Undefined for what is not whole. */
function parseInfo(data: Buffer): { name: string } | undefined {
  if (data.length < 6) return undefined;
  const nameBytes = data.readUInt32BE(0);
  if (nameBytes > maxNameBytes || data.length < 6 + nameBytes) return undefined;
  const infos = data.readUInt16BE(4 + nameBytes);
  if (data.length !== 6 + nameBytes + infos * 2) return undefined;
  return { name: data.toString('utf8', 4, 4 + nameBytes) };
}

function parseContexts(data: Buffer): { name: string; queries: string[] } | undefined {
  let at = 0;
  const text = (): string | undefined => {
    if (data.length < at + 4) return undefined;
    const bytes = data.readUInt32BE(at);
    if (bytes > maxNameBytes || data.length < at + 4 + bytes) return undefined;
    at += 4 + bytes;
    return data.toString('utf8', at - bytes, at);
  };
  const name = text();
  if (name === undefined || data.length < at + 4) return undefined;
  const count = data.readUInt32BE(at);
  at += 4;
  const queries: string[] = [];
  for (let i = 0; i < count; i += 1) {
    const query = text();
    if (query === undefined) return undefined;
    queries.push(query);
  }
  return at === data.length ? { name, queries } : undefined;
}

function sized(text: string): Buffer {
  const bytes = Buffer.from(text);
  const head = Buffer.alloc(4);
  head.writeUInt32BE(bytes.length);
  return Buffer.concat([head, bytes]);
}

function simple(request: NbdRequest, error: number): Buffer {
  const bytes = Buffer.alloc(16);
  bytes.writeUInt32BE(simpleReplyMagic, 0);
  bytes.writeUInt32BE(error, 4);
  bytes.writeBigUInt64BE(request.cookie, 8);
  return bytes;
}

function chunkHeader(request: NbdRequest, type: number, lengthBytes: number): Buffer {
  const bytes = Buffer.alloc(20);
  bytes.writeUInt32BE(structuredReplyMagic, 0);
  bytes.writeUInt16BE(chunkDone, 4);
  bytes.writeUInt16BE(type, 6);
  bytes.writeBigUInt64BE(request.cookie, 8);
  bytes.writeUInt32BE(lengthBytes, 16);
  return bytes;
}

function chunk(request: NbdRequest, type: number, parts: readonly Buffer[]): Buffer {
  const lengthBytes = parts.reduce((sum, part) => sum + part.length, 0);
  return Buffer.concat([chunkHeader(request, type, lengthBytes), ...parts]);
}
