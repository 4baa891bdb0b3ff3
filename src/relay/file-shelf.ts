/**
 * Slabs in files, one for each group: written one behind the other, and gone with the group. What is in them is sealed, and
 * nobody else reads them all the same. Nothing of an earlier daemon is kept.
 */
import { mkdirSync, rmSync } from 'node:fs';
import { type FileHandle, open, rm } from 'node:fs/promises';
import path from 'node:path';
import type { Kept, Shelf } from './slab-store.ts';

interface GroupFile {
  handle: Promise<FileHandle>;
  endBytes: number;
}

export class FileShelf implements Shelf<Promise<Buffer>> {
  /** A file grows until it goes. */
  readonly isAppendOnly = true;
  readonly #directory: string;
  readonly #files = new Map<string, GroupFile>();

  /** Empties the directory, which is its own. */
  constructor(directory: string) {
    this.#directory = directory;
    rmSync(directory, { recursive: true, force: true });
  }

  async keep(group: string, bytes: Uint8Array): Promise<Kept<Promise<Buffer>>> {
    const file = this.#files.get(group) ?? this.#open(group);
    const { length } = bytes;
    const at = file.endBytes;
    file.endBytes += length;
    const handle = await file.handle;
    const { bytesWritten } = await handle.write(bytes, 0, length, at);
    if (bytesWritten < length) throw new Error(`The file of a group took ${bytesWritten} of ${length} bytes`);
    return { length, read: () => read(handle, at, length) };
  }

  forget(group: string): void {
    const file = this.#files.get(group);
    if (!file) return;
    this.#files.delete(group);
    void file.handle
      .then((handle) => handle.close())
      .catch(() => {})
      .then(() => rm(this.#pathOf(group), { force: true }));
  }

  #open(group: string): GroupFile {
    mkdirSync(this.#directory, { recursive: true, mode: 0o700 });
    const file = { handle: open(this.#pathOf(group), 'wx+', 0o600), endBytes: 0 };
    this.#files.set(group, file);
    file.handle.catch(() => {
      // The next one tries again.
      if (this.#files.get(group) === file) this.#files.delete(group);
    });
    return file;
  }

  /** Groups are named by digests. */
  #pathOf(group: string): string {
    return path.join(this.#directory, group);
  }
}

async function read(handle: FileHandle, at: number, length: number): Promise<Buffer> {
  const { buffer, bytesRead } = await handle.read(Buffer.allocUnsafeSlow(length), 0, length, at);
  if (bytesRead < length) throw new Error(`The file of a group ends ${length - bytesRead} bytes too soon`);
  return buffer;
}
