/**
 * The reference sets of base images: each image gets an index beside it, made in the background, one at a time, and
 * made anew when it is damaged or the image's file was changed behind our back. Such a file is judged by its digest
 * first: if these are not the image's bytes any more, there is no set of it.
 */
import { rm, stat } from 'node:fs/promises';
import path from 'node:path';
import type { FastifyBaseLogger } from 'fastify';
import { AppError, asAppError } from '../../model/errors.ts';
import type { ImageDigest } from '../../model/ids.ts';
import type { ImageIndexView } from '../../model/vm.ts';
import {
  type BlockReader,
  buildIndex,
  contentReader,
  contentSource,
  type IndexFile,
  openIndex,
  readIndexHeader,
  type SetName,
} from '../../pages/index.ts';
import { openDiskContent } from '../../vm/disk-content.ts';
import { type ImageFormat, imageFile, verifyImage } from '../../vm/images.ts';

export interface Indexed {
  digest: ImageDigest;
  format: ImageFormat;
}

interface Entry extends Indexed {
  view: ImageIndexView;
  abort: AbortController;
}

export const imageSetName = (digest: ImageDigest): SetName => `image:${digest}`;

export class ImageIndexes {
  readonly #root: string;
  readonly #log: FastifyBaseLogger;
  readonly #entries = new Map<ImageDigest, Entry>();
  readonly #queue: { entry: Entry; isFresh: boolean }[] = [];
  #working: Promise<void> | undefined;
  #isClosed = false;

  /** `root`: the store of images. */
  constructor(options: { root: string; log: FastifyBaseLogger }) {
    this.#root = options.root;
    this.#log = options.log;
  }

  /** How far the index of the image is. */
  view(digest: ImageDigest): ImageIndexView {
    return this.#entries.get(digest)?.view ?? { state: 'waiting' };
  }

  /** Sees to it that the image has an index, sooner or later. `isFresh`: its digest was checked just now. */
  add({ digest, format }: Indexed, { isFresh = false }: { isFresh?: boolean } = {}): void {
    if (this.#isClosed || this.#entries.has(digest)) return;
    const entry: Entry = { digest, format, view: { state: 'waiting' }, abort: new AbortController() };
    this.#entries.set(digest, entry);
    this.#enqueue(entry, isFresh);
  }

  /** The image goes. */
  remove(digest: ImageDigest): void {
    const entry = this.#entries.get(digest);
    if (!entry) return;
    this.#entries.delete(digest);
    entry.abort.abort(new AppError('cancelled', `Image ${digest} is removed`));
  }

  /** Resolves when no index is being made or waits to be. */
  async settled(): Promise<void> {
    while (this.#working) await this.#working;
  }

  /** The source's half: undefined while there is no index. A damaged one is noticed here and made anew. */
  async openIndex(digest: ImageDigest): Promise<IndexFile | undefined> {
    const entry = await this.#sound(digest);
    if (!entry) return undefined;
    try {
      return await openIndex(this.#indexFile(entry), { signal: entry.abort.signal });
    } catch (error) {
      this.#log.warn({ err: error, image: digest }, 'index of the image cannot be read and is made anew');
      // Its header may be sound, and would be believed.
      await rm(this.#indexFile(entry), { force: true });
      this.#enqueue(entry, false);
      return undefined;
    }
  }

  /** The destination's half: undefined when the image's bytes are not known to be good. */
  async openBlocks(digest: ImageDigest): Promise<BlockReader | undefined> {
    const entry = await this.#sound(digest);
    return entry && contentReader(await openDiskContent(this.#imageFile(entry), entry.format));
  }

  async close(): Promise<void> {
    this.#isClosed = true;
    const why = new AppError('interrupted', 'The daemon stops.');
    for (const { abort } of this.#entries.values()) abort.abort(why);
    await this.settled();
  }

  /** The entry, if its index is ready and the image's file is the one that it was made from. */
  async #sound(digest: ImageDigest): Promise<Entry | undefined> {
    const entry = this.#entries.get(digest);
    if (entry?.view.state !== 'ready') return undefined;
    if (await this.#isCurrent(entry)) return entry;
    this.#enqueue(entry, false);
    return undefined;
  }

  async #isCurrent(entry: Entry): Promise<boolean> {
    try {
      const { name, stamp } = await readIndexHeader(this.#indexFile(entry));
      return name === imageSetName(entry.digest) && stamp === (await stampOf(this.#imageFile(entry)));
    } catch {
      return false;
    }
  }

  #enqueue(entry: Entry, isFresh: boolean): void {
    entry.view = { state: 'waiting' };
    if (this.#isClosed || this.#queue.some((each) => each.entry === entry)) return;
    this.#queue.push({ entry, isFresh });
    this.#working ??= this.#work().finally(() => {
      this.#working = undefined;
    });
  }

  async #work(): Promise<void> {
    for (let next = this.#queue[0]; next; next = this.#queue[0]) {
      const { entry, isFresh } = next;
      try {
        await this.#make(entry, isFresh);
      } catch (error) {
        if (!entry.abort.signal.aborted)
          this.#log.warn({ err: error, image: entry.digest }, 'no index of the image');
        entry.view = { state: 'failed', message: asAppError(error).message };
      }
      this.#queue.shift();
    }
  }

  async #make(entry: Entry, isFresh: boolean): Promise<void> {
    const { digest, format, abort } = entry;
    const { signal } = abort;
    signal.throwIfAborted();
    if (!(await this.#isCurrent(entry))) {
      entry.view = { state: 'building', doneBytes: 0, totalBytes: 0 };
      if (!isFresh) await verifyImage(this.#root, digest, format, signal);
      const stamp = await stampOf(this.#imageFile(entry));
      await using content = await openDiskContent(this.#imageFile(entry), format);
      await buildIndex({
        file: this.#indexFile(entry),
        name: imageSetName(digest),
        stamp,
        source: contentSource(content),
        signal,
        onProgress: ({ doneBlocks, totalBlocks }) => {
          entry.view = { state: 'building', doneBytes: doneBlocks * 4096, totalBytes: totalBlocks * 4096 };
        },
      });
    }
    const { records } = await readIndexHeader(this.#indexFile(entry));
    const { size } = await stat(this.#indexFile(entry));
    entry.view = { state: 'ready', blocks: records, fileBytes: size };
  }

  #imageFile({ digest, format }: Indexed): string {
    return imageFile(this.#root, digest, format);
  }

  /** In the image's own directory, so that it goes with the image. */
  #indexFile(image: Indexed): string {
    return path.join(path.dirname(this.#imageFile(image)), 'blocks.index');
  }
}

/** Tells one state of a file from another as well as can be without reading it. */
async function stampOf(file: string): Promise<string> {
  const { size, mtimeNs } = await stat(file, { bigint: true });
  return `size ${size}, changed ${mtimeNs}`;
}
