/**
 * For tests: a source QEMU and a destination QEMU as far as the agents see them. The source writes a real migration
 * stream out of a buffer of RAM, the destination loads one into another and behaves as strictly as QEMU does.
 */
import { Duplex, Readable } from 'node:stream';
import { setImmediate as nextTurn } from 'node:timers/promises';
import {
  type Answer,
  BlockTable,
  beginSection,
  command,
  encodeAnswer,
  eof,
  PageWriter,
  pageBytes,
  StreamParser,
  sectionEnd,
  startSection,
} from '../../stream/index.ts';
import type { MemoryWriter, PagePiece, WritableRam } from './guest-memory.ts';

const sectionId = 2;

/** RAM with one block of the VM's and one of a device's. */
export class FakeRam implements WritableRam {
  readonly bytes: Buffer;
  /** What the QEMU whose RAM it is makes of a page that is put there. */
  onWrite = (_page: number): void => {};
  readonly #table: BlockTable;

  constructor(pages: number) {
    this.#table = new BlockTable([
      { name: 'pc.ram', sizeBytes: (pages - 4) * pageBytes },
      { name: 'vga.vram', sizeBytes: 4 * pageBytes },
    ]);
    this.bytes = Buffer.alloc(pages * pageBytes);
  }

  table(): BlockTable {
    return this.#table;
  }

  use(_table: BlockTable): void {}

  read(page: number, count: number, to: Buffer, at = 0): void {
    this.bytes.copy(to, at, page * pageBytes, (page + count) * pageBytes);
  }

  writerOf(from: SharedArrayBuffer): MemoryWriter {
    const write = ({ page, count, at }: PagePiece) => {
      const to = this.bytes.subarray(page * pageBytes, (page + count) * pageBytes);
      if (at === undefined) to.fill(0);
      else to.set(new Uint8Array(from, at, count * pageBytes));
      for (let each = page; each < page + count; each++) this.onWrite(each);
    };
    return {
      // As late as it may be.
      write: async (pieces) => {
        await nextTurn();
        pieces.forEach(write);
      },
      async [Symbol.asyncDispose]() {},
    };
  }

  page(number: number): Buffer {
    return this.bytes.subarray(number * pageBytes, (number + 1) * pageBytes);
  }
}

const opening = Buffer.from('5145564d00000003070000000474657374', 'hex');
/** A FULL section of no meaning, EOF, and the description. */
export const devices = Buffer.concat([
  Buffer.from('0400000009046465766900000000000000010102037e00000009', 'hex'),
]);
const description = Buffer.from('{"devices":[]}');
const tail = Buffer.concat([devices, eof(), Buffer.of(6, 0, 0, 0, description.length), description]);

/** What the source QEMU writes: whole rounds, between which `between` may change the RAM. */
export function sourceStream(
  ram: FakeRam,
  options: {
    rounds: readonly (readonly number[])[];
    between?: (round: number) => void | Promise<void>;
    strange?: Buffer;
  },
): Readable {
  const { rounds, between, strange } = options;
  const table = ram.table();
  const writer = new PageWriter(table);
  async function* pieces(): AsyncGenerator<Buffer> {
    yield opening;
    if (strange) return yield strange;
    yield startSection(sectionId, table);
    for (const [round, pages] of rounds.entries()) {
      yield beginSection('part', sectionId);
      for (const page of pages) {
        const to = Buffer.alloc(PageWriter.maxBytes);
        const isZero = ram.page(page).every((byte) => byte === 0);
        const end = isZero ? writer.zeroPage(to, 0, page) : writer.page(to, 0, page, ram.page(page), 0);
        yield to.subarray(0, end);
      }
      yield sectionEnd(sectionId);
      if (round < rounds.length - 1) await between?.(round);
    }
    yield beginSection('end', sectionId);
    yield sectionEnd(sectionId);
    yield tail;
  }
  return Readable.from(pieces(), { objectMode: false });
}

export const allPages = (ram: FakeRam): number[] => Array.from({ length: ram.table().pages }, (_, i) => i);

/** Loads a stream as QEMU does, into RAM; refuses what QEMU would refuse. */
export class FakeQemu extends Duplex {
  readonly ram: FakeRam;
  readonly #parser: StreamParser;
  /** Post-copy: pages that are not there; and those that the stream has brought. */
  readonly lacks: Set<number>;
  readonly received = new Set<number>();
  isPostcopy = false;
  tail: Buffer[] = [];
  written = 0;
  /** Pages that its guest touches first when it runs. */
  #touches: readonly number[];

  /** With `paused` it is one whose post-copy has lost its stream, and begins with the questions of a recovery. */
  constructor(
    ram: FakeRam,
    touches: readonly number[] = [],
    paused?: { lacks: Set<number>; received: Set<number> },
  ) {
    super({ allowHalfOpen: true });
    this.ram = ram;
    this.#touches = touches;
    this.lacks = paused?.lacks ?? new Set();
    for (const page of paused?.received ?? []) this.received.add(page);
    if (paused) this.isPostcopy = true;
    ram.onWrite = (page) => {
      if (this.isPostcopy) throw new Error(`page ${page} was put there while the VM runs`);
      this.lacks.delete(page);
    };
    const table = ram.table();
    this.#parser = new StreamParser(
      {
        page: (page, buffer, at) => this.#place(page, buffer.subarray(at, at + pageBytes)),
        zeroPage: (page) => this.#place(page, Buffer.alloc(pageBytes)),
        command: (code, payload) => {
          if (code === command.postcopyAdvise) this.#empty();
          if (code === command.discard) this.#discard(payload);
          if (code === command.ping) this.answer({ name: 'pong', value: payload.readUInt32BE(0) });
          if (code === command.receivedBitmap) this.#tellReceived(payload.toString('latin1', 1));
          if (code === command.postcopyResume) {
            this.answer({ name: 'resume-ack', value: 1 });
            this.#touch();
          }
        },
        package: () => {
          this.isPostcopy = true;
          this.#touch();
        },
        tail: (bytes) => {
          this.tail.push(Buffer.from(bytes));
          if (this.isPostcopy) this.answer({ name: 'shut', value: 0 });
        },
      },
      paused && table,
    );
    if (!paused) return;
    // A stream that goes on has no beginning, and its guest has been waiting.
    this.#parser.push(opening);
    this.#touch();
  }

  #touch(): void {
    const table = this.ram.table();
    for (const page of this.unanswered) {
      const block = table.blocks[table.blockOf(page)]!;
      const startByte = (page - block.firstPage) * pageBytes;
      this.answer({ name: 'request-pages', startByte, bytes: pageBytes, blockName: block.name });
    }
  }

  /** What its guest has touched and not got. */
  get unanswered(): number[] {
    return this.#touches.filter((page) => this.lacks.has(page));
  }

  #empty(): void {
    this.ram.bytes.fill(0);
    for (const page of allPages(this.ram)) this.lacks.add(page);
  }

  #tellReceived(blockName: string): void {
    const table = this.ram.table();
    const { firstPage, pages } = table.blocks[table.indexOf(blockName)]!;
    const bits = Buffer.alloc(Math.ceil(pages / 64) * 8);
    for (let page = 0; page < pages; page++)
      if (this.received.has(firstPage + page)) bits[page >>> 3]! |= 1 << (page & 7);
    this.answer({ name: 'received-bitmap', blockName, bits });
  }

  answer(answer: Answer): void {
    this.push(encodeAnswer(answer));
  }

  override _read(): void {}

  override _write(bytes: Buffer, _encoding: BufferEncoding, done: (error?: Error) => void): void {
    try {
      this.#parser.push(bytes);
      this.written += bytes.length;
      // Later, as a socket does.
      setImmediate(done);
    } catch (error) {
      done(error as Error);
    }
  }

  override _final(done: () => void): void {
    this.push(null);
    done();
  }

  #place(page: number, content: Buffer): void {
    if (!this.lacks.delete(page) && this.isPostcopy) throw new Error(`EEXIST: page ${page} came twice`);
    this.received.add(page);
    content.copy(this.ram.page(page));
  }

  #discard(payload: Buffer): void {
    const nameBytes = payload[1]!;
    const table = this.ram.table();
    const block = table.blocks[table.indexOf(payload.toString('latin1', 2, 2 + nameBytes))]!;
    for (let at = 3 + nameBytes; at < payload.length; at += 16) {
      const first = block.firstPage + Number(payload.readBigUInt64BE(at)) / pageBytes;
      const count = Number(payload.readBigUInt64BE(at + 8)) / pageBytes;
      for (let page = first; page < first + count; page++) {
        this.lacks.add(page);
        this.received.delete(page);
        this.ram.page(page).fill(0xee);
      }
    }
  }
}

/** One end of a link in memory: a write is done when the other end's reader has room. */
class LinkEnd extends Duplex {
  peer!: LinkEnd;
  harm: Harm | undefined;
  readonly #onBytes: (bytes: number) => void;
  #waiting: (() => void) | undefined;

  constructor(onBytes: (bytes: number) => void) {
    super({ allowHalfOpen: true, readableHighWaterMark: 65_536 });
    this.#onBytes = onBytes;
    // A test looks at what the agents say of it.
    this.on('error', () => {});
  }

  override _read(): void {
    this.#waiting?.();
    this.#waiting = undefined;
  }

  arrive(bytes: Buffer, done: () => void): void {
    if (this.push(bytes)) setImmediate(done);
    else this.#waiting = done;
  }

  override _write(bytes: Buffer, _encoding: BufferEncoding, done: () => void): void {
    this.#onBytes(bytes.length);
    // What is written is read later, so a buffer that is used again would show.
    const arriving = this.#harmed(bytes);
    if (!this.destroyed) setImmediate(() => this.peer.arrive(arriving, done));
  }

  #harmed(bytes: Buffer): Buffer {
    if (!this.harm || bytes.length < this.harm.from) return bytes;
    const { place, xor } = this.harm;
    this.harm = undefined;
    const copy = Buffer.from(bytes);
    copy[place % copy.length]! ^= xor;
    return copy;
  }

  override _final(done: () => void): void {
    setImmediate(() => this.peer.push(null));
    done();
  }

  override _destroy(error: Error | null, done: (error: Error | null) => void): void {
    if (!this.peer.destroyed) setImmediate(() => this.peer.destroy(new Error('The other end is gone')));
    done(error);
  }
}

/** In the first write of at least `from` bytes, one byte arrives as another. */
export interface Harm {
  from: number;
  /** Where, modulo the bytes of that write. */
  place: number;
  xor: number;
}

/** Two ends of a stream, which breaks after so many bytes, those of both directions counted together. */
export function linkPair(cutAfterBytes = Number.POSITIVE_INFINITY, harm?: Harm): [Duplex, Duplex] {
  let left = cutAfterBytes;
  const onBytes = (bytes: number): void => {
    left -= bytes;
    if (left < 0) for (const end of [near, far]) end.destroy(new Error('cut'));
  };
  const near: LinkEnd = new LinkEnd(onBytes);
  const far: LinkEnd = new LinkEnd(onBytes);
  near.peer = far;
  far.peer = near;
  near.harm = harm;
  return [near, far];
}
