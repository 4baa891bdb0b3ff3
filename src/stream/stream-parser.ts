/**
 * Reads a migration stream as its bytes come, for pre-copy, post-copy and hybrid. It does no I/O and holds only what
 * is incomplete: a record, or a package. Pages are told by number and place, without an object for each.
 *
 *   opening -> (commands, sections of ram)* -> tail
 *
 * Device sections carry no length, so from the first of them on, or from EOF, everything is the tail.
 */
import { BlockTable } from './blocks.ts';
import { ByteQueue } from './byte-queue.ts';
import {
  command,
  flag,
  limits,
  magic,
  pageBytes,
  pageShift,
  ramVersion,
  section,
  version,
} from './layout.ts';
import { type Refusal, streamRefused } from './refusal.ts';

export type RamSectionKind = 'start' | 'part' | 'end';

/** Buffers are valid only during the call. What a handler throws, `push` throws. */
export interface StreamHandler {
  /** The header and the configuration, as they are. */
  opening?(bytes: Buffer): void;
  sectionBegins?(kind: RamSectionKind, id: number): void;
  blocks?(table: BlockTable): void;
  /** The page with this number in the table has the content `buffer[at .. at + 4096]`. */
  page?(page: number, buffer: Buffer, at: number): void;
  zeroPage?(page: number): void;
  sectionEnds?(kind: RamSectionKind, id: number): void;
  command?(code: number, payload: Buffer): void;
  /** The nested stream of a post-copy: LISTEN, the devices, RUN. */
  package?(bytes: Buffer): void;
  tail?(bytes: Buffer): void;
}

/** A record that begins at `at` says in how many bytes it can be read; `undefined` while that is not known. */
const maxRecordBytes = 8 + 1 + 255 + pageBytes;

const kindOf: Record<number, RamSectionKind> = {
  [section.start]: 'start',
  [section.part]: 'part',
  [section.end]: 'end',
};

/** Payload bytes by command; those that are missing vary. */
const commandBytes: Record<number, number> = {
  [command.openReturnPath]: 0,
  [command.ping]: 4,
  [command.postcopyListen]: 0,
  [command.postcopyRun]: 0,
  [command.packaged]: 4,
  [command.postcopyResume]: 0,
  [command.switchoverStart]: 0,
};
const lastCommand = 11;

export class StreamParser {
  readonly #handler: StreamHandler;
  readonly #queue = new ByteQueue();
  #state: 'opening' | 'between' | 'records' | 'package' | 'tail' = 'opening';
  #kind: RamSectionKind = 'start';
  #sectionId: number | undefined;
  #table: BlockTable | undefined;
  /** Of the last page record: CONTINUE means the same block. */
  #block = -1;
  #firstPage = 0;
  #blockPages = 0;
  #packageBytes = 0;
  #refused: Error | undefined;
  /** Bytes of the stream up to the end of the queue. */
  #seenBytes = 0;

  /** `table`: for a stream that goes on where another ended, as a recovery does. */
  constructor(handler: StreamHandler, table?: BlockTable) {
    this.#handler = handler;
    this.#table = table;
  }

  /** Throws `qemu_failed` with one of `refusals` as its reason; after that it takes nothing any more. */
  push(bytes: Uint8Array): void {
    if (this.#refused) throw this.#refused;
    try {
      this.#take(bytes);
    } catch (error) {
      this.#refused = error as Error;
      throw error;
    }
  }

  /** For a handler of pages: where in the stream the byte `buffer[at]` stands. */
  positionOf(at: number): number {
    const { start, length } = this.#queue;
    return this.#seenBytes - (start + length - at);
  }

  /** The stream has ended. Throws if that was in the middle. */
  end(): void {
    if (this.#refused) throw this.#refused;
    if (this.#state !== 'tail') this.#refuse('truncated', `${this.#queue.length} bytes after ${this.#state}`);
  }

  #take(bytes: Uint8Array): void {
    if (this.#state === 'tail') {
      this.#handler.tail?.(Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength));
      return;
    }
    const queue = this.#queue;
    let at = 0;
    // What the bytes before have left begins a record: as much is put behind it as ends it, and all others are read
    // where they lie.
    while (queue.length > 0 && at < bytes.length) {
      const some = Math.min(maxRecordBytes, bytes.length - at);
      queue.push(bytes.subarray(at, at + some));
      at += some;
      this.#seenBytes += some;
      while (this.#step());
      if (queue.length > some) continue;
      at -= queue.length;
      this.#seenBytes -= queue.length;
      queue.drop(queue.length);
    }
    if (at === bytes.length) return;
    queue.lend(bytes.subarray(at));
    this.#seenBytes += bytes.length - at;
    try {
      while (this.#step());
    } finally {
      queue.keep();
    }
  }

  /** Reads one thing; false when bytes are missing for it. */
  #step(): boolean {
    switch (this.#state) {
      case 'opening':
        return this.#opening();
      case 'between':
        return this.#between();
      case 'records':
        return this.#records();
      case 'package':
        return this.#package();
      case 'tail':
        if (this.#queue.length > 0) this.#handler.tail?.(this.#queue.takeAll());
        return false;
    }
  }

  #opening(): boolean {
    const { buffer, start, length } = this.#queue;
    if (length < 9) return false;
    if (buffer.readUInt32BE(start) !== magic || buffer.readUInt32BE(start + 4) !== version)
      this.#refuse('header', buffer.toString('hex', start, start + 8));
    const bytes = this.#configurationBytes(start + 8, start + length);
    if (bytes === undefined) return false;
    this.#handler.opening?.(buffer.subarray(start, start + 8 + bytes));
    this.#queue.start += 8 + bytes;
    this.#state = 'between';
    return true;
  }

  /** The length of the configuration section at `from`: 0 if there is none, `undefined` while not all is there. */
  #configurationBytes(from: number, to: number): number | undefined {
    const { buffer } = this.#queue;
    if (buffer[from] !== section.configuration) return 0;
    if (to - from < 5) return undefined;
    const nameBytes = buffer.readUInt32BE(from + 1);
    if (nameBytes > 255) this.#refuse('length', `machine type of ${nameBytes} bytes`);
    let at = from + 5 + nameBytes;
    for (;;) {
      if (at >= to) return undefined;
      if (buffer[at] !== section.subsection) return at - from;
      if (at - from > limits.configurationBytes) this.#refuse('length', 'configuration');
      const subName = at + 2;
      if (subName > to) return undefined;
      const body = subName + buffer[at + 1]! + 4;
      if (body > to) return undefined;
      const end = this.#subsectionEnd(buffer.toString('latin1', subName, body - 4), body, to);
      if (end === undefined) return undefined;
      at = end;
    }
  }

  #subsectionEnd(name: string, body: number, to: number): number | undefined {
    const { buffer } = this.#queue;
    if (name === 'configuration/uuid') return body + 16;
    if (body + 4 > to) return undefined;
    const value = buffer.readUInt32BE(body);
    if (name === 'configuration/target-page-bits') {
      if (value !== pageShift) this.#refuse('header', `pages of 2^${value} bytes`);
      return body + 4;
    }
    if (name !== 'configuration/capabilities') this.#refuse('header', `subsection ${name}`);
    let at = body + 4;
    for (let left = value; left > 0; left--) {
      if (at - body > limits.configurationBytes) this.#refuse('length', 'capabilities');
      if (at >= to) return undefined;
      at += 1 + buffer[at]!;
    }
    return at;
  }

  #between(): boolean {
    const { buffer, start, length } = this.#queue;
    if (length < 1) return false;
    const type = buffer[start]!;
    switch (type) {
      case section.start:
        return this.#startSection(start, length);
      case section.part:
      case section.end: {
        if (length < 5) return false;
        const id = buffer.readUInt32BE(start + 1);
        if (id !== this.#sectionId) this.#refuse('section_id', `${id}`);
        this.#beginSection(kindOf[type]!, 5);
        return true;
      }
      case section.command:
        return this.#command(start, length);
      case section.full:
      case section.eof:
        this.#state = 'tail';
        return true;
      default:
        return this.#refuse('section', `kind ${type}`);
    }
  }

  #startSection(start: number, length: number): boolean {
    const { buffer } = this.#queue;
    if (length < 6) return false;
    const nameBytes = buffer[start + 5]!;
    if (length < 14 + nameBytes) return false;
    const name = buffer.toString('latin1', start + 6, start + 6 + nameBytes);
    if (name !== 'ram' || this.#sectionId !== undefined) this.#refuse('iterable', JSON.stringify(name));
    const sectionVersion = buffer.readUInt32BE(start + 10 + nameBytes);
    if (sectionVersion !== ramVersion) this.#refuse('ram_version', `${sectionVersion}`);
    this.#sectionId = buffer.readUInt32BE(start + 1);
    this.#beginSection('start', 14 + nameBytes);
    return true;
  }

  #beginSection(kind: RamSectionKind, headerBytes: number): void {
    this.#queue.start += headerBytes;
    this.#kind = kind;
    this.#state = 'records';
    this.#handler.sectionBegins?.(kind, this.#sectionId!);
  }

  #command(start: number, length: number): boolean {
    const { buffer } = this.#queue;
    if (length < 5) return false;
    const code = buffer.readUInt16BE(start + 1);
    const bytes = buffer.readUInt16BE(start + 3);
    const wanted = commandBytes[code];
    if (code < 1 || code > lastCommand || (wanted !== undefined && bytes !== wanted))
      this.#refuse('command', `${code} with ${bytes} bytes`);
    if (bytes > limits.commandBytes) this.#refuse('length', `command ${code} of ${bytes} bytes`);
    if (length < 5 + bytes) return false;
    if (code === command.packaged) {
      this.#packageBytes = buffer.readUInt32BE(start + 5);
      if (this.#packageBytes > limits.packageBytes)
        this.#refuse('length', `package of ${this.#packageBytes} bytes`);
      this.#state = 'package';
    } else {
      this.#handler.command?.(code, buffer.subarray(start + 5, start + 5 + bytes));
    }
    this.#queue.start += 5 + bytes;
    return true;
  }

  #package(): boolean {
    const { buffer, start, length } = this.#queue;
    if (length < this.#packageBytes) return false;
    this.#handler.package?.(buffer.subarray(start, start + this.#packageBytes));
    this.#queue.start += this.#packageBytes;
    this.#state = 'between';
    return true;
  }

  /** As many records of a section of RAM as are there, in one go: nearly all bytes of a stream pass here. */
  #records(): boolean {
    const queue = this.#queue;
    const { buffer } = queue;
    const end = queue.start + queue.length;
    let at = queue.start;
    while (end - at >= 8) {
      const low = buffer.readUInt32BE(at + 4);
      const flags = low & 0xfff;
      const isPage = flags & (flag.page | flag.zero);
      if (isPage) {
        const body = at + 8 + this.#selectBlock(flags, at + 8, end);
        const bodyBytes = flags & flag.page ? pageBytes : 1;
        if (body + bodyBytes > end || body < at) break;
        this.#emitPage(flags, buffer.readUInt32BE(at) * 2 ** 20 + (low >>> pageShift), body);
        at = body + bodyBytes;
      } else if (flags === flag.memSize) {
        const size = this.#memSize(at, end);
        if (size === undefined) break;
        at += size;
      } else if (flags === flag.eos) {
        if (end - at < 13) break;
        this.#endSection(at + 8);
        queue.start = at + 13;
        return true;
      } else this.#refuse('flags', `0x${flags.toString(16)}`);
    }
    queue.start = at;
    if (end - at > maxRecordBytes && this.#table) this.#refuse('length', 'record');
    return false;
  }

  /** The bytes of the block's name in front of the page; far too negative while they are not there. */
  #selectBlock(flags: number, at: number, end: number): number {
    const kind = flags & ~flag.continue;
    if (kind !== flag.page && kind !== flag.zero) this.#refuse('flags', `0x${flags.toString(16)}`);
    if (flags & flag.continue) {
      if (this.#block < 0) this.#refuse('block', 'the same as none');
      return 0;
    }
    const { buffer } = this.#queue;
    if (at >= end || at + 1 + buffer[at]! > end) return Number.NEGATIVE_INFINITY;
    const nameBytes = buffer[at]!;
    const name = buffer.toString('latin1', at + 1, at + 1 + nameBytes);
    const index = this.#table?.indexOf(name) ?? -1;
    if (index < 0) this.#refuse('block', JSON.stringify(name));
    const { firstPage, pages } = this.#table!.blocks[index]!;
    this.#block = index;
    this.#firstPage = firstPage;
    this.#blockPages = pages;
    return 1 + nameBytes;
  }

  #emitPage(flags: number, pageInBlock: number, body: number): void {
    const { buffer } = this.#queue;
    if (pageInBlock >= this.#blockPages) this.#refuse('block', `page ${pageInBlock} of ${this.#blockPages}`);
    const page = this.#firstPage + pageInBlock;
    if (flags & flag.page) this.#handler.page?.(page, buffer, body);
    else if (buffer[body] === 0) this.#handler.zeroPage?.(page);
    else this.#refuse('flags', `a page filled with ${buffer[body]}`);
  }

  /** The length of the table of blocks at `at`; `undefined` while not all is there. */
  #memSize(at: number, end: number): number | undefined {
    const { buffer } = this.#queue;
    if (this.#kind !== 'start' || this.#table) this.#refuse('blocks', 'a second table');
    const total = Number(buffer.readBigUInt64BE(at) & ~0xfffn);
    if (total > limits.memoryBytes) this.#refuse('blocks', `${total} bytes of RAM`);
    const sizes: { name: string; sizeBytes: number }[] = [];
    let sum = 0;
    let next = at + 8;
    while (sum < total) {
      if (next >= end || next + 9 + buffer[next]! > end) return undefined;
      const nameBytes = buffer[next]!;
      const name = buffer.toString('latin1', next + 1, next + 1 + nameBytes);
      const sizeBytes = Number(buffer.readBigUInt64BE(next + 1 + nameBytes));
      const isSound = sizeBytes > 0 && sizeBytes % pageBytes === 0 && nameBytes > 0;
      if (!isSound || sizes.length >= limits.blocks || sizes.some((size) => size.name === name))
        this.#refuse('blocks', `${JSON.stringify(name)} of ${sizeBytes} bytes`);
      sizes.push({ name, sizeBytes });
      sum += sizeBytes;
      next += 9 + nameBytes;
    }
    if (sum !== total) this.#refuse('blocks', `${sum} of ${total} bytes`);
    this.#table = new BlockTable(sizes);
    this.#handler.blocks?.(this.#table);
    return next - at;
  }

  #endSection(footer: number): void {
    const { buffer } = this.#queue;
    const id = buffer.readUInt32BE(footer + 1);
    if (buffer[footer] !== section.footer || id !== this.#sectionId)
      this.#refuse('section_id', `footer ${buffer[footer]} of ${id}`);
    if (!this.#table) this.#refuse('blocks', 'none');
    this.#state = 'between';
    this.#handler.sectionEnds?.(this.#kind, this.#sectionId!);
  }

  #refuse(reason: Refusal, found: string): never {
    throw streamRefused(reason, found);
  }
}
