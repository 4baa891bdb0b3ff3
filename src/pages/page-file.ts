/**
 * Memory pages that stay behind when a VM has left, readable by page number, encrypted at rest: FORMAT.md.
 *
 * Each file has a random key of its own, wrapped by the daemon's; the nonce of a page is its number, so no page may be
 * written twice under one key, and the writer refuses it. The file is whole or not there.
 */
import { createCipheriv, createDecipheriv, createSecretKey, type KeyObject, randomBytes } from 'node:crypto';
import { type FileHandle, open, rename, rm } from 'node:fs/promises';
import { AppError } from '../model/errors.ts';
import { blockBytes, digestBytes, digestOf } from './blocks.ts';
import { runsOf } from './content-blocks.ts';
import type { BlockReader } from './reference-set.ts';

const algorithm = 'aes-256-gcm';
const keyBytes = 32;
const nonceBytes = 12;
const tagBytes = 16;
const headerBytes = 4096;
const recordBytes = tagBytes + blockBytes;
const wrappedAt = 16;
const checkAt = headerBytes - digestBytes;
const magic = Buffer.from('VIPERPGF');
const version = 1;

export const pageFileKeyBytes = keyBytes;

export class PageFileWriter implements AsyncDisposable {
  readonly #file: string;
  readonly #handle: FileHandle;
  readonly #pageCount: number;
  /** Made once: of the bytes of a key node:crypto makes one for each page, which took it most of the time. */
  readonly #key: KeyObject;
  readonly #written: Uint8Array;
  #writtenBytes = headerBytes;
  #isFinished = false;

  /** `wrapping` is the daemon's key, 32 bytes. Page numbers run up to `pageCount` - 1. */
  static async create(options: {
    file: string;
    pageCount: number;
    wrapping: Buffer;
  }): Promise<PageFileWriter> {
    const { file, pageCount, wrapping } = options;
    const handle = await open(partialOf(file), 'w', 0o600);
    const key = randomBytes(keyBytes);
    const writer = new PageFileWriter(file, handle, pageCount, createSecretKey(key));
    try {
      await writeWhole(handle, encodeHeader(pageCount, key, wrapping), 0);
    } catch (error) {
      await writer[Symbol.asyncDispose]();
      throw error;
    } finally {
      key.fill(0);
    }
    return writer;
  }

  private constructor(file: string, handle: FileHandle, pageCount: number, key: KeyObject) {
    this.#file = file;
    this.#handle = handle;
    this.#pageCount = pageCount;
    this.#key = key;
    this.#written = new Uint8Array(Math.ceil(pageCount / 8));
  }

  /** What the file takes on the disk so far. */
  get writtenBytes(): number {
    return this.#writtenBytes;
  }

  /** Pages in any order, 4 KiB each, each once. Throws `invalid_request` for a number out of range or seen before. */
  async write(pages: Uint32Array, bytes: Buffer): Promise<void> {
    for (const { at, block, count } of runsOf(pages, this.#pageCount)) {
      const records = Buffer.allocUnsafe(count * recordBytes);
      for (let i = 0; i < count; i += 1) {
        this.#mark(block + i);
        const cipher = createCipheriv(algorithm, this.#key, nonceOf(block + i));
        const page = bytes.subarray((at + i) * blockBytes, (at + i + 1) * blockBytes);
        cipher.update(page).copy(records, i * recordBytes + tagBytes);
        cipher.final();
        cipher.getAuthTag().copy(records, i * recordBytes);
      }
      await writeWhole(this.#handle, records, headerBytes + block * recordBytes);
      this.#writtenBytes += records.length;
    }
  }

  /** The file is on the disk under its name. */
  async finish(): Promise<void> {
    await this.#handle.sync();
    await rename(partialOf(this.#file), this.#file);
    this.#isFinished = true;
  }

  /** Removes what is not finished. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.#handle.close();
    if (!this.#isFinished) await rm(partialOf(this.#file), { force: true });
  }

  #mark(page: number): void {
    const bit = 1 << (page & 7);
    if ((this.#written[page >>> 3]! & bit) !== 0)
      throw new AppError('invalid_request', `Write page file: page ${page} comes twice, wanted once`);
    this.#written[page >>> 3]! |= bit;
  }
}

/**
 * Opens a page file. Throws `image_corrupt` when it is damaged or was written with another key; reading a page that
 * was never written or has changed throws the same.
 */
export async function openPageFile(file: string, wrapping: Buffer): Promise<BlockReader> {
  await using undo = new AsyncDisposableStack();
  const handle = undo.use(await open(file, 'r'));
  const { pageCount, key } = decodeHeader(await readAt(handle, headerBytes, 0), wrapping);
  undo.move();
  return {
    blockCount: pageCount,
    async read(blocks: Uint32Array): Promise<Buffer> {
      const bytes = Buffer.allocUnsafe(blocks.length * blockBytes);
      for (const { at, block, count } of runsOf(blocks, pageCount)) {
        const records = await readAt(handle, count * recordBytes, headerBytes + block * recordBytes);
        for (let i = 0; i < count; i += 1)
          decryptPage(records.subarray(i * recordBytes), key, block + i).copy(bytes, (at + i) * blockBytes);
      }
      return bytes;
    },
    [Symbol.asyncDispose]: () => handle.close(),
  };
}

function decryptPage(record: Buffer, key: KeyObject, page: number): Buffer {
  const decipher = createDecipheriv(algorithm, key, nonceOf(page), { authTagLength: tagBytes });
  decipher.setAuthTag(record.subarray(0, tagBytes));
  const bytes = decipher.update(record.subarray(tagBytes, recordBytes));
  try {
    decipher.final();
  } catch (cause) {
    throw damaged(`page ${page} is missing or has changed`, 'a page as it was written', cause);
  }
  return bytes;
}

function encodeHeader(pageCount: number, key: Buffer, wrapping: Buffer): Buffer {
  const bytes = Buffer.alloc(headerBytes);
  magic.copy(bytes);
  bytes.writeUInt32LE(version, 8);
  bytes.writeUInt32LE(pageCount, 12);
  const nonce = randomBytes(nonceBytes);
  const cipher = createCipheriv(algorithm, wrapping, nonce).setAAD(bytes.subarray(0, wrappedAt));
  const wrapped = Buffer.concat([cipher.update(key), cipher.final()]);
  Buffer.concat([nonce, cipher.getAuthTag(), wrapped]).copy(bytes, wrappedAt);
  digestOf(bytes.subarray(0, checkAt)).copy(bytes, checkAt);
  return bytes;
}

function decodeHeader(bytes: Buffer, wrapping: Buffer): { pageCount: number; key: KeyObject } {
  if (!magic.equals(bytes.subarray(0, 8)) || bytes.readUInt32LE(8) !== version)
    throw damaged('it begins with something else', 'VIPERPGF, version 1');
  if (!digestOf(bytes.subarray(0, checkAt)).equals(bytes.subarray(checkAt)))
    throw damaged('the digest of its header is wrong', 'an undamaged header');
  const tagAt = wrappedAt + nonceBytes;
  const keyAt = tagAt + tagBytes;
  const decipher = createDecipheriv(algorithm, wrapping, bytes.subarray(wrappedAt, tagAt), {
    authTagLength: tagBytes,
  });
  decipher.setAAD(bytes.subarray(0, wrappedAt)).setAuthTag(bytes.subarray(tagAt, keyAt));
  const key = decipher.update(bytes.subarray(keyAt, keyAt + keyBytes));
  try {
    decipher.final();
  } catch (cause) {
    throw damaged('its key does not unwrap', 'the key that it was written with', cause);
  }
  return { pageCount: bytes.readUInt32LE(12), key: createSecretKey(key) };
}

function nonceOf(page: number): Buffer {
  const nonce = Buffer.alloc(nonceBytes);
  nonce.writeUInt32LE(page);
  return nonce;
}

const partialOf = (file: string): string => `${file}.partial`;

async function writeWhole(handle: FileHandle, bytes: Buffer, position: number): Promise<void> {
  for (let at = 0; at < bytes.length; )
    at += (await handle.write(bytes, at, bytes.length - at, position + at)).bytesWritten;
}

async function readAt(handle: FileHandle, length: number, position: number): Promise<Buffer> {
  const bytes = Buffer.allocUnsafe(length);
  for (let at = 0; at < length; ) {
    const { bytesRead } = await handle.read(bytes, at, length - at, position + at);
    if (bytesRead === 0)
      throw damaged(`it ends at byte ${position + at}`, `${length} bytes from ${position}`);
    at += bytesRead;
  }
  return bytes;
}

const damaged = (met: string, wanted: string, cause?: unknown): AppError =>
  new AppError('image_corrupt', `Read page file: ${met}, wanted ${wanted}`, {}, { cause });
