/** For tests: the captures in `fixtures`, and a handler that writes again what it is told. */
import { readFileSync } from 'node:fs';
import path from 'node:path';
import { zstdDecompressSync } from 'node:zlib';
import {
  type BlockTable,
  beginSection,
  commandBytes,
  PageWriter,
  sectionEnd,
  startSection,
} from './index.ts';
import { command } from './layout.ts';
import { be32 } from './records.ts';
import type { StreamHandler } from './stream-parser.ts';

export const versions = ['10.0', '7.2'] as const;
export const modes = ['precopy', 'postcopy', 'hybrid'] as const;

/** `out` is the stream of the source, `back` the return path. */
export function golden(version: string, mode: string, direction: 'out' | 'back' = 'out'): Buffer {
  const file = path.join(import.meta.dirname, 'fixtures', `${version}-${mode}.${direction}.zst`);
  return zstdDecompressSync(readFileSync(file));
}

export class Rewriter implements StreamHandler {
  readonly pieces: Buffer[] = [];
  readonly #record = Buffer.alloc(PageWriter.maxBytes);
  table: BlockTable | undefined;
  #writer: PageWriter | undefined;

  get bytes(): Buffer {
    return Buffer.concat(this.pieces);
  }

  opening(bytes: Buffer): void {
    this.pieces.push(Buffer.from(bytes));
  }

  sectionBegins(kind: 'start' | 'part' | 'end', id: number): void {
    if (kind !== 'start') this.pieces.push(beginSection(kind, id));
  }

  blocks(table: BlockTable): void {
    this.table = table;
    this.#writer = new PageWriter(table);
  }

  page(page: number, buffer: Buffer, at: number): void {
    this.#add(this.#writer!.page(this.#record, 0, page, buffer, at));
  }

  zeroPage(page: number): void {
    this.#add(this.#writer!.zeroPage(this.#record, 0, page));
  }

  sectionEnds(kind: 'start' | 'part' | 'end', id: number): void {
    this.pieces.push(kind === 'start' ? startSection(id, this.table!) : sectionEnd(id));
  }

  command(code: number, payload: Buffer): void {
    this.pieces.push(commandBytes(code, payload));
  }

  package(bytes: Buffer): void {
    this.pieces.push(commandBytes(command.packaged, be32(bytes.length)), Buffer.from(bytes));
    // QEMU names the block again after the switch.
    this.#writer?.reset();
  }

  tail(bytes: Buffer): void {
    this.pieces.push(Buffer.from(bytes));
  }

  #add(bytes: number): void {
    this.pieces.push(Buffer.from(this.#record.subarray(0, bytes)));
  }
}
