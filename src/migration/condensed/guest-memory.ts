/**
 * The RAM of a QEMU of ours, read and written from outside through /proc/PID/mem: no change of the VM's hardware, no
 * help of QEMU's but where its blocks lie (`info ramblock`, with addresses since QEMU 8.0).
 *
 * A running guest writes meanwhile, so what is read is a page at some moment. To migration that is as good as QEMU's
 * own reading, which also only comes after a page's dirty bit was cleared.
 */
import { constants, readSync } from 'node:fs';
import { type FileHandle, open } from 'node:fs/promises';
import { AppError } from '../../model/errors.ts';
import type { QmpConnection } from '../../qmp/index.ts';
import { BlockTable, pageBytes } from '../../stream/index.ts';
import { RamWriter, type Span } from './ram-writer.ts';

/** Where a block lies in QEMU's own address space. */
export interface MappedBlock {
  name: string;
  sizeBytes: number;
  address: number;
}

/** What the agents need of it. */
export interface GuestRam {
  /** All blocks that QEMU has, as they would stand in a stream. */
  table(): BlockTable;
  /** From now on pages are numbered by this table. Throws `unsupported` when QEMU has other blocks. */
  use(table: BlockTable): void;
  /** The content of `count` consecutive pages of one block, to `to` from `at` on. */
  read(page: number, count: number, to: Buffer, at?: number): void;
}

/** Of a QEMU whose VM does not run yet. */
export interface WritableRam extends GuestRam {
  /** For pages whose content lies in `from`. To be disposed of before the memory is. */
  writerOf(from: SharedArrayBuffer): MemoryWriter;
}

/** `count` consecutive pages, whose content begins at `at` in the buffer; pages of zeroes where `at` is missing. */
export interface PagePiece {
  page: number;
  count: number;
  at: number | undefined;
}

export interface MemoryWriter extends AsyncDisposable {
  /** One after the other. Resolves when they are there. Throws `unsupported` when the memory does not take them. */
  write(pieces: readonly PagePiece[]): Promise<void>;
}

export class GuestMemory implements WritableRam, AsyncDisposable {
  readonly mapped: readonly MappedBlock[];
  readonly #file: FileHandle;
  #table: BlockTable | undefined;
  #addresses: number[] = [];

  private constructor(mapped: MappedBlock[], file: FileHandle) {
    this.mapped = mapped;
    this.#file = file;
  }

  /** Throws `unsupported` with the reason when this host or this QEMU does not allow it. */
  static async open(
    pid: number,
    qmp: QmpConnection,
    { timeoutMs, mayWrite = false }: { timeoutMs?: number; mayWrite?: boolean } = {},
  ): Promise<GuestMemory> {
    const options = timeoutMs === undefined ? {} : { timeoutMs };
    const text = await qmp.execute('human-monitor-command', { 'command-line': 'info ramblock' }, options);
    const mapped = parseRamBlocks(text);
    if (mapped.length === 0) throw unreadable('this QEMU does not tell where the blocks lie');
    let file: FileHandle;
    try {
      file = await open(`/proc/${pid}/mem`, mayWrite ? constants.O_RDWR : constants.O_RDONLY);
    } catch (error) {
      throw unreadable((error as Error).message);
    }
    const memory = new GuestMemory(mapped, file);
    try {
      memory.use(memory.table());
      memory.read(0, 1, Buffer.alloc(pageBytes));
    } catch (error) {
      await file.close();
      throw unreadable((error as Error).message);
    }
    return memory;
  }

  table(): BlockTable {
    return new BlockTable(this.mapped);
  }

  use(table: BlockTable): void {
    this.#addresses = table.blocks.map(({ name, sizeBytes }) => {
      const found = this.mapped.find((block) => block.name === name);
      if (!found || found.sizeBytes < sizeBytes) throw unreadable(`block ${name} is not there`);
      return found.address;
    });
    this.#table = table;
  }

  read(page: number, count: number, to: Buffer, at = 0): void {
    const table = this.#table!;
    const index = table.blockOf(page);
    const { firstPage } = table.blocks[index]!;
    const position = this.#addresses[index]! + (page - firstPage) * pageBytes;
    const wanted = count * pageBytes;
    for (let done = 0; done < wanted; ) {
      const bytes = readSync(this.#file.fd, to, at + done, wanted - done, position + done);
      if (bytes <= 0) throw unreadable(`page ${page} is gone`);
      done += bytes;
    }
  }

  writerOf(from: SharedArrayBuffer): MemoryWriter {
    const writer = new RamWriter({ fd: this.#file.fd, from });
    return {
      write: (pieces) => writer.write(pieces.flatMap((piece) => this.#spansOf(piece))),
      [Symbol.asyncDispose]: () => writer[Symbol.asyncDispose](),
    };
  }

  #spansOf({ page, count, at }: PagePiece): Span[] {
    const table = this.#table!;
    const spans: Span[] = [];
    for (let done = 0; done < count; ) {
      const index = table.blockOf(page + done);
      const { firstPage, pages } = table.blocks[index]!;
      const some = Math.min(count - done, firstPage + pages - page - done);
      spans.push({
        position: this.#addresses[index]! + (page + done - firstPage) * pageBytes,
        at: at === undefined ? -1 : at + done * pageBytes,
        bytes: some * pageBytes,
      });
      done += some;
    }
    return spans;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#file.close();
  }
}

/** The table that `info ramblock` prints; nothing where it has no column of addresses. */
export function parseRamBlocks(text: string): MappedBlock[] {
  const line =
    /^\s*(\S.*?)\s+4 KiB\s+0x[0-9a-f]+\s+(0x[0-9a-f]+)\s+0x[0-9a-f]+\s+(0x[0-9a-f]+)\s+r[ow]\s*$/gm;
  return [...text.matchAll(line)].map(([, name, size, address]) => ({
    name: name!,
    sizeBytes: Number(size),
    address: Number(address),
  }));
}

const unreadable = (why: string): AppError =>
  new AppError('unsupported', `Cannot read the memory of the VM from outside: ${why}`, {
    missing: 'guest-memory',
  });
