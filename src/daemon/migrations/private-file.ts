/** A file of a VM's that only this daemon reads, such as where its memory is that relays hold, with the key to it. */
import { open, readFile, rename, rm } from 'node:fs/promises';
import path from 'node:path';

export class PrivateFile {
  readonly #directory: string;
  readonly #file: string;

  /** `directory`: the VM's, or that of the escrows. It must be there when something is written. */
  constructor(directory: string, name: string) {
    this.#directory = directory;
    this.#file = path.join(directory, name);
  }

  async read(): Promise<Buffer | undefined> {
    try {
      return await readFile(this.#file);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
      throw error;
    }
  }

  /** All of it or nothing. Resolves when it is on the disk, or with `isBrief` when it outlives this process alone. */
  async write(bytes: Buffer, { isBrief = false }: { isBrief?: boolean } = {}): Promise<void> {
    const draft = `${this.#file}.new`;
    await rm(draft, { force: true });
    const file = await open(draft, 'wx', 0o600);
    try {
      await file.writeFile(bytes);
      if (!isBrief) await file.sync();
    } finally {
      await file.close();
    }
    await rename(draft, this.#file);
    if (isBrief) return;
    const directory = await open(this.#directory);
    try {
      await directory.sync();
    } finally {
      await directory.close();
    }
  }

  async remove(): Promise<void> {
    await rm(this.#file, { force: true });
  }
}
