/**
 * Captured memory as the two halves of a reference set. The file is a migration stream of QEMU, so a page lies anywhere
 * in it: block n of the set is the n-th page with content, and a table beside the file says where that begins
 * (FORMAT.md of pages). It belongs to one state of the file, which whoever keeps it has to know.
 */
import { type FileHandle, open, readFile, rename, stat, writeFile } from 'node:fs/promises';
import { AppError } from '../../model/errors.ts';
import {
  type BlockReader,
  type BlockSource,
  blockBytes,
  digestBytes,
  digestOf,
  maxPieceBlocks,
  type Piece,
} from '../../pages/index.ts';
import { StreamParser } from '../../stream/index.ts';

const magic = Buffer.from('VIPERPGT');
const version = 1;
const headerBytes = 16 + digestBytes;
const offsetBytes = 8;
const chunkBytes = 1024 * 1024;
/** What lies between two pages that follow each other in one block of RAM. */
const recordHeaderBytes = 8;
const readsAtOnce = 8;

/**
 * For `buildIndex`, after which `writeTable` writes where the pages lie. Throws `image_corrupt` for a file that is no
 * plain stream.
 */
export async function capturedSource(
  file: string,
): Promise<BlockSource & { writeTable(table: string): Promise<void> }> {
  const { size } = await stat(file);
  const offsets: number[] = [];
  return {
    blockCount: Math.floor(size / (blockBytes + recordHeaderBytes)),
    async *pieces(signal: AbortSignal): AsyncIterable<Piece> {
      const pieces: Piece[] = [];
      let piece = emptyPiece();
      let filled = 0;
      const parser: StreamParser = new StreamParser({
        page: (_page, buffer, at) => {
          offsets.push(parser.positionOf(at));
          piece.set(buffer.subarray(at, at + blockBytes), filled * blockBytes);
          filled += 1;
          if (filled < maxPieceBlocks) return;
          pieces.push({ first: offsets.length - filled, bytes: piece });
          piece = emptyPiece();
          filled = 0;
        },
      });
      await using handle = await open(file, 'r');
      const chunk = Buffer.allocUnsafeSlow(chunkBytes);
      for (let position = 0; position < size; ) {
        signal.throwIfAborted();
        const { bytesRead } = await handle.read(chunk, 0, chunkBytes, position);
        if (bytesRead === 0) break;
        position += bytesRead;
        parse(parser, chunk.subarray(0, bytesRead), file);
        yield* pieces.splice(0);
      }
      if (filled > 0)
        yield { first: offsets.length - filled, bytes: Buffer.from(piece.subarray(0, filled * blockBytes)) };
    },
    async writeTable(table) {
      const body = Buffer.alloc(offsets.length * offsetBytes);
      for (const [index, offset] of offsets.entries())
        body.writeBigUInt64LE(BigInt(offset), index * offsetBytes);
      const head = Buffer.alloc(16);
      magic.copy(head);
      head.writeUInt32LE(version, 8);
      head.writeUInt32LE(offsets.length, 12);
      await writeFile(`${table}.partial`, Buffer.concat([head, digestOf(body), body]), { mode: 0o600 });
      await rename(`${table}.partial`, table);
    },
  };
}

/** The destination's half. Throws `image_corrupt` for a table that is damaged. */
export async function openCaptured(file: string, table: string): Promise<BlockReader> {
  const offsets = await readTable(table);
  const handle = await open(file, 'r');
  const blockCount = offsets.length / offsetBytes;
  const offsetOf = (block: number): number => Number(offsets.readBigUInt64LE(block * offsetBytes));
  return {
    blockCount,
    async read(blocks) {
      const bytes = Buffer.allocUnsafe(blocks.length * blockBytes);
      const runs = [...stretches(blocks, blockCount, offsetOf)];
      let next = 0;
      const readSome = async () => {
        for (let run = runs[next++]; run; run = runs[next++]) await readStretch(handle, file, run, bytes);
      };
      await Promise.all(Array.from({ length: Math.min(readsAtOnce, runs.length) }, readSome));
      return bytes;
    },
    [Symbol.asyncDispose]: () => handle.close(),
  };
}

/** Pages that lie in the file one behind the other, with nothing but the heads of their records between them. */
interface Stretch {
  /** Index in what was asked for. */
  at: number;
  offset: number;
  count: number;
}

function* stretches(
  blocks: Uint32Array,
  blockCount: number,
  offsetOf: (block: number) => number,
): Iterable<Stretch> {
  let last: Stretch | undefined;
  for (const [at, block] of blocks.entries()) {
    if (block >= blockCount) {
      const problem = { field: 'block', value: block, wanted: `less than ${blockCount}` };
      throw new AppError(
        'invalid_request',
        `Read captured memory: block is ${block}, wanted ${problem.wanted}`,
        {
          problems: [problem],
        },
      );
    }
    const offset = offsetOf(block);
    const continues =
      last &&
      last.count < maxPieceBlocks &&
      offset === last.offset + last.count * (blockBytes + recordHeaderBytes);
    if (continues) last!.count += 1;
    else {
      if (last) yield last;
      last = { at, offset, count: 1 };
    }
  }
  if (last) yield last;
}

async function readStretch(
  handle: FileHandle,
  file: string,
  { at, offset, count }: Stretch,
  to: Buffer,
): Promise<void> {
  const stride = blockBytes + recordHeaderBytes;
  const wanted = count * stride - recordHeaderBytes;
  const bytes =
    count === 1 ? to.subarray(at * blockBytes, (at + 1) * blockBytes) : Buffer.allocUnsafe(wanted);
  const { bytesRead } = await handle.read(bytes, 0, wanted, offset);
  if (bytesRead < wanted) throw damaged(file, `it ends before byte ${offset + wanted}`);
  if (count === 1) return;
  for (let index = 0; index < count; index += 1)
    bytes.copy(to, (at + index) * blockBytes, index * stride, index * stride + blockBytes);
}

async function readTable(file: string): Promise<Buffer> {
  const bytes = await readFile(file);
  const isSound =
    bytes.length >= headerBytes &&
    magic.equals(bytes.subarray(0, 8)) &&
    bytes.readUInt32LE(8) === version &&
    bytes.length === headerBytes + bytes.readUInt32LE(12) * offsetBytes;
  if (!isSound) throw damaged(file, 'it is no table of pages');
  const body = bytes.subarray(headerBytes);
  if (!digestOf(body).equals(bytes.subarray(16, headerBytes))) throw damaged(file, 'its digest is wrong');
  return body;
}

function parse(parser: StreamParser, bytes: Buffer, file: string): void {
  try {
    parser.push(bytes);
  } catch (cause) {
    throw damaged(file, (cause as Error).message, cause);
  }
}

const emptyPiece = (): Buffer => Buffer.allocUnsafeSlow(maxPieceBlocks * blockBytes);

const damaged = (file: string, why: string, cause?: unknown): AppError =>
  new AppError('image_corrupt', `Read ${file}: ${why}`, { file }, { cause });
