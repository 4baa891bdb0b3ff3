/** Writes the parts of a migration stream that we emit. Pure: each function gives the bytes of one part. */
import type { BlockTable } from './blocks.ts';
import { command, flag, pageBytes, ramVersion, section } from './layout.ts';

/** Ranges of one DISCARD, as many as QEMU sends itself. */
const discardRanges = 12;

export function startSection(id: number, table: BlockTable): Buffer {
  const total = be64(table.pages * pageBytes, flag.memSize);
  const blocks = table.blocks.flatMap((block) => [shortString(block.name), be64(block.sizeBytes)]);
  return Buffer.concat([sectionStart(id), total, ...blocks, sectionEnd(id)]);
}

/** Gives the section of RAM a number, with no records in it: for a stream that goes on in the middle. */
export const renameSection = (id: number): Buffer => Buffer.concat([sectionStart(id), sectionEnd(id)]);

const sectionStart = (id: number): Buffer =>
  Buffer.concat([Buffer.of(section.start), be32(id), shortString('ram'), be32(0), be32(ramVersion)]);

export const beginSection = (kind: 'part' | 'end', id: number): Buffer =>
  Buffer.concat([Buffer.of(kind === 'part' ? section.part : section.end), be32(id)]);

/** EOS and the footer. */
export const sectionEnd = (id: number): Buffer =>
  Buffer.concat([be64(0, flag.eos), Buffer.of(section.footer), be32(id)]);

export const eof = (): Buffer => Buffer.of(section.eof);

export function commandBytes(code: number, payload: Uint8Array = new Uint8Array()): Buffer {
  const head = Buffer.alloc(5);
  head[0] = section.command;
  head.writeUInt16BE(code, 1);
  head.writeUInt16BE(payload.length, 3);
  return Buffer.concat([head, payload]);
}

export const openReturnPath = (): Buffer => commandBytes(command.openReturnPath);
export const ping = (value: number): Buffer => commandBytes(command.ping, be32(value));

/** All blocks have pages of 4 KiB: huge pages are refused before. */
export const postcopyAdvise = (): Buffer =>
  commandBytes(command.postcopyAdvise, Buffer.concat([be64(pageBytes), be64(pageBytes)]));

/** `ranges` as pairs of a first page within the block and a count of pages. */
export function discard(blockName: string, ranges: readonly (readonly [number, number])[]): Buffer[] {
  const head = Buffer.concat([Buffer.of(0), shortString(blockName), Buffer.of(0)]);
  const commands: Buffer[] = [];
  for (let at = 0; at < ranges.length; at += discardRanges) {
    const some = ranges
      .slice(at, at + discardRanges)
      .flatMap(([first, count]) => [be64(first * pageBytes), be64(count * pageBytes)]);
    commands.push(commandBytes(command.discard, Buffer.concat([head, ...some])));
  }
  return commands;
}

/** The switch to post-copy: the destination listens for pages, loads the devices and is ready to run. */
export function postcopyPackage(devices: Uint8Array, pingValue: number): Buffer {
  const nested = Buffer.concat([
    commandBytes(command.postcopyListen),
    devices,
    ping(pingValue),
    commandBytes(command.postcopyRun),
  ]);
  return Buffer.concat([commandBytes(command.packaged, be32(nested.length)), nested]);
}

/** Asks for the bitmap of what has arrived, when a post-copy is resumed. */
export const askReceivedBitmap = (blockName: string): Buffer =>
  commandBytes(command.receivedBitmap, shortString(blockName));

export const postcopyResume = (): Buffer => commandBytes(command.postcopyResume);

/**
 * Writes page records one after the other into a buffer that it is given. CONTINUE says the block of the record
 * before, also across sections.
 */
export class PageWriter {
  readonly #table: BlockTable;
  readonly #names: Buffer[];
  #block = -1;
  #firstPage = 0;
  #lastPage = -1;

  /** The most that one page takes. */
  static readonly maxBytes = 8 + 1 + 255 + pageBytes;

  constructor(table: BlockTable) {
    this.#table = table;
    this.#names = table.blocks.map(({ name }) => shortString(name));
  }

  /** The next record names its block: the reader is another one. */
  reset(): void {
    this.#block = -1;
    this.#lastPage = -1;
  }

  /** Writes the record at `at` in `to`; gives where the next one goes. */
  page(to: Buffer, at: number, page: number, content: Uint8Array, contentAt: number): number {
    const body = this.#head(to, at, page, flag.page);
    to.set(content.subarray(contentAt, contentAt + pageBytes), body);
    return body + pageBytes;
  }

  zeroPage(to: Buffer, at: number, page: number): number {
    const body = this.#head(to, at, page, flag.zero);
    to[body] = 0;
    return body + 1;
  }

  #head(to: Buffer, at: number, page: number, kind: number): number {
    const isSame = this.#block >= 0 && page >= this.#firstPage && page < this.#lastPage;
    if (!isSame) {
      this.#block = this.#table.blockOf(page);
      const { firstPage, pages } = this.#table.blocks[this.#block]!;
      this.#firstPage = firstPage;
      this.#lastPage = firstPage + pages;
    }
    const inBlock = page - this.#firstPage;
    to.writeUInt32BE(Math.floor(inBlock / 2 ** 20), at);
    to.writeUInt32BE(((inBlock * pageBytes) % 2 ** 32) + kind + (isSame ? flag.continue : 0), at + 4);
    if (isSame) return at + 8;
    const name = this.#names[this.#block]!;
    to.set(name, at + 8);
    return at + 8 + name.length;
  }
}

export function shortString(text: string): Buffer {
  const bytes = Buffer.from(text, 'latin1');
  return Buffer.concat([Buffer.of(bytes.length), bytes]);
}

export function be32(value: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(value);
  return bytes;
}

function be64(value: number, flags = 0): Buffer {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64BE(BigInt(value) | BigInt(flags));
  return bytes;
}
