/**
 * The reference sets of golden snapshots: the memory of each, by page. An index and a table of pages are made beside it
 * in the background, one snapshot at a time, and made anew when the file was changed.
 *
 * The set is called by the digest of its content, so two cloudlets that hold the same snapshot call it the same. A
 * golden snapshot is the memory of a VM that nobody has used, booted from an image; so it may serve every VM on that
 * image, and no other.
 */
import { rm, stat } from 'node:fs/promises';
import path from 'node:path';
import type { FastifyBaseLogger } from 'fastify';
import { capturedSource, openCaptured } from '../../migration/condensed/captured-pages.ts';
import { AppError, asAppError } from '../../model/errors.ts';
import type { ImageDigest, Uuid } from '../../model/ids.ts';
import type { ImageIndexView, SnapshotRecord } from '../../model/vm.ts';
import {
  type BlockReader,
  buildIndex,
  type IndexFile,
  openIndex,
  readIndexHeader,
  type SetName,
} from '../../pages/index.ts';

interface Entry {
  id: Uuid;
  image: ImageDigest;
  name: SetName | undefined;
  view: ImageIndexView;
  abort: AbortController;
}

const prefix = 'golden:';
/** A VM is on one image, of which there may be any number of snapshots; each costs a look-up for each page. */
const mostOfImage = 4;

export class SnapshotIndexes {
  readonly #directory: (id: Uuid) => string;
  readonly #log: FastifyBaseLogger;
  readonly #entries = new Map<Uuid, Entry>();
  #last: Promise<void> = Promise.resolve();
  #isClosed = false;

  /** `directory`: where the files of a snapshot are. */
  constructor(options: { directory: (id: Uuid) => string; log: FastifyBaseLogger }) {
    this.#directory = options.directory;
    this.#log = options.log;
  }

  view(id: Uuid): ImageIndexView {
    return this.#entries.get(id)?.view ?? { state: 'waiting' };
  }

  /** Sees to it that the snapshot has an index, sooner or later. */
  add({ id, spec }: Pick<SnapshotRecord, 'id' | 'spec'>): void {
    if (this.#isClosed || this.#entries.has(id)) return;
    const entry: Entry = {
      id,
      image: spec.disk.image,
      name: undefined,
      view: { state: 'waiting' },
      abort: new AbortController(),
    };
    this.#entries.set(id, entry);
    this.#enqueue(entry);
  }

  /** The snapshot goes. */
  remove(id: Uuid): void {
    this.#entries.get(id)?.abort.abort(new AppError('cancelled', `Snapshot ${id} is removed`));
    this.#entries.delete(id);
  }

  /** The sets that may serve a VM on this image, the newest first. */
  setsFor(image: ImageDigest): SetName[] {
    const names = this.#of(image).map(({ name }) => name!);
    return [...new Set(names)].slice(0, mostOfImage);
  }

  /** The source's half: undefined while there is no index, or none that is sound. */
  async openIndex(image: ImageDigest, name: SetName): Promise<IndexFile | undefined> {
    const entry = await this.#sound(image, name);
    if (!entry) return undefined;
    try {
      return await openIndex(this.#files(entry).index, { signal: entry.abort.signal });
    } catch (error) {
      await this.#again(entry, error);
      return undefined;
    }
  }

  /** The destination's half. */
  async openBlocks(image: ImageDigest, name: SetName): Promise<BlockReader | undefined> {
    const entry = await this.#sound(image, name);
    if (!entry) return undefined;
    const { memory, table } = this.#files(entry);
    try {
      return await openCaptured(memory, table);
    } catch (error) {
      await this.#again(entry, error);
      return undefined;
    }
  }

  async close(): Promise<void> {
    this.#isClosed = true;
    const why = new AppError('interrupted', 'The daemon stops.');
    for (const { abort } of this.#entries.values()) abort.abort(why);
    await this.#last;
  }

  #of(image: ImageDigest): Entry[] {
    return [...this.#entries.values()]
      .filter((entry) => entry.image === image && entry.view.state === 'ready')
      .reverse();
  }

  async #sound(image: ImageDigest, name: SetName): Promise<Entry | undefined> {
    const entry = this.#of(image).find((each) => each.name === name);
    if (!entry) return undefined;
    if (await this.#isCurrent(entry)) return entry;
    this.#enqueue(entry);
    return undefined;
  }

  /** Its header may be sound, and would be believed. */
  async #again(entry: Entry, error: unknown): Promise<void> {
    this.#log.warn({ err: error, snapshotId: entry.id }, 'index of the snapshot is made anew');
    await rm(this.#files(entry).index, { force: true });
    this.#enqueue(entry);
  }

  async #isCurrent(entry: Entry): Promise<boolean> {
    const { index, memory, table } = this.#files(entry);
    try {
      const { stamp } = await readIndexHeader(index);
      await stat(table);
      return stamp === (await stampOf(memory));
    } catch {
      return false;
    }
  }

  #enqueue(entry: Entry): void {
    entry.view = { state: 'waiting' };
    this.#last = this.#last.then(async () => {
      try {
        await this.#make(entry);
      } catch (error) {
        if (!entry.abort.signal.aborted)
          this.#log.warn({ err: error, snapshotId: entry.id }, 'no index of the snapshot');
        entry.view = { state: 'failed', message: asAppError(error).message };
      }
    });
  }

  async #make(entry: Entry): Promise<void> {
    const { signal } = entry.abort;
    const { memory, table, index } = this.#files(entry);
    signal.throwIfAborted();
    if (!(await this.#isCurrent(entry))) {
      // Whoever finds an index finds the table that belongs to it.
      await rm(index, { force: true });
      const stamp = await stampOf(memory);
      const source = await capturedSource(memory);
      await buildIndex({
        file: index,
        name: prefix,
        stamp,
        // The table stands before the index gets its name, which is at its end.
        source: {
          blockCount: source.blockCount,
          async *pieces(abort) {
            yield* source.pieces(abort);
            await source.writeTable(table);
          },
        },
        signal,
        onProgress: ({ doneBlocks, totalBlocks }) => {
          entry.view = { state: 'building', doneBytes: doneBlocks * 4096, totalBytes: totalBlocks * 4096 };
        },
      });
    }
    const { records, name } = await readIndexHeader(index);
    entry.name = name;
    entry.view = { state: 'ready', blocks: records, fileBytes: (await stat(index)).size };
  }

  #files({ id }: Entry): { memory: string; table: string; index: string } {
    const directory = this.#directory(id);
    return {
      memory: path.join(directory, 'memory'),
      table: path.join(directory, 'memory.pages'),
      index: path.join(directory, 'memory.index'),
    };
  }
}

/** Tells one state of a file from another as well as can be without reading it. */
async function stampOf(file: string): Promise<string> {
  const { size, mtimeNs } = await stat(file, { bigint: true });
  return `size ${size}, changed ${mtimeNs}`;
}
