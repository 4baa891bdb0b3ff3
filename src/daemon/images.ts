/** The images of this cloudlet: the files with their records and aliases, told by events. */
import type { Static } from 'typebox';
import type { ImportQuery } from '../contract/schemas.ts';
import { AppError } from '../model/errors.ts';
import type { ImageDigest } from '../model/ids.ts';
import type { ImageRecord } from '../model/vm.ts';
import { cleanLeftovers, importImage, listImages, removeImage } from '../vm/images.ts';
import type { Config } from './config.ts';
import type { EventLog } from './events.ts';
import type { Paths } from './paths.ts';
import type { ImageIndexes } from './references/image-indexes.ts';
import type { Page, PageRequest, Store } from './store/index.ts';

/** Each holds a connection and hashes: more at once only make each other slow. */
const maxImports = 8;

type ImportRequest = Static<typeof ImportQuery> & {
  sizeBytes?: number;
  /** What came of it before stays, and `source` brings the rest: told before it is read. Needs the digest. */
  onStart?: (startBytes: number) => void;
};

export class ImageService {
  readonly #store: Store;
  readonly #events: EventLog;
  readonly #paths: Paths;
  readonly #config: Config;
  #importing = 0;
  /** Files on their way out. */
  readonly #removals = new Map<ImageDigest, Promise<void>>();
  /** Those whose first bytes a transfer at work has taken up. */
  readonly #resuming = new Set<ImageDigest>();
  readonly #holds = new Set<{ digest: ImageDigest; by: { kind: string; name: string } }>();

  readonly #indexes: ImageIndexes;

  constructor(options: {
    store: Store;
    events: EventLog;
    paths: Paths;
    config: Config;
    indexes: ImageIndexes;
  }) {
    this.#indexes = options.indexes;
    this.#store = options.store;
    this.#events = options.events;
    this.#paths = options.paths;
    this.#config = options.config;
  }

  list(request: PageRequest): Page<ImageRecord> {
    return this.#store.images.list(request);
  }

  /** By digest or alias. */
  get(reference: string): ImageRecord {
    const found = this.#store.images.find(reference);
    if (found) return found;
    throw new AppError('not_found', `There is no image '${reference}'`, { kind: 'image', name: reference });
  }

  /** Takes the file in; the same bytes again only add the alias. Nothing stays behind of one that fails. */
  async import(
    source: AsyncIterable<Uint8Array>,
    request: ImportRequest,
    signal: AbortSignal,
  ): Promise<ImageRecord> {
    if (this.#importing >= maxImports) {
      throw new AppError('too_many', `${maxImports} images are being imported already`, {
        limit: maxImports,
      });
    }
    const { alias, digest: expectedDigest, format, sizeBytes, onStart } = request;
    const named = alias === undefined ? undefined : this.#store.images.getByAlias(alias);
    // Where the announcement already tells that these are other bytes, they need not come.
    if (
      named &&
      ((expectedDigest ?? named.digest) !== named.digest ||
        (sizeBytes ?? named.fileBytes) !== named.fileBytes)
    )
      throw aliasTaken(alias!);
    // A second transfer of the same image brings all of it.
    const isResumable =
      expectedDigest !== undefined && onStart !== undefined && !this.#resuming.has(expectedDigest);
    if (isResumable) this.#resuming.add(expectedDigest);
    else onStart?.(0);
    this.#importing += 1;
    try {
      const imported = await importImage(this.#paths.images, {
        source,
        signal,
        reserveBytes: this.#config.reserveBytes,
        ...(sizeBytes === undefined ? {} : { sizeBytes }),
        ...(expectedDigest === undefined ? {} : { expectedDigest }),
        ...(format === undefined ? {} : { format }),
        ...(isResumable ? { onStart } : {}),
      });
      const removal = this.#removals.get(imported.digest);
      if (removal) {
        // The import found the file still there and wrote none; now it is gone.
        await removal;
        throw new AppError(
          'interrupted',
          `Image ${imported.digest} was removed while it was imported: send it again`,
        );
      }
      return await this.#record(imported, alias);
    } finally {
      if (isResumable) this.#resuming.delete(expectedDigest);
      this.#importing -= 1;
    }
  }

  async #record(
    imported: Omit<ImageRecord, 'aliases' | 'createdAt'>,
    alias: string | undefined,
  ): Promise<ImageRecord> {
    const { digest } = imported;
    try {
      const record = this.#store.transact(() => {
        if (alias && (this.#store.images.getByAlias(alias)?.digest ?? digest) !== digest)
          throw aliasTaken(alias);
        if (!this.#store.images.get(digest)) {
          this.#store.images.insert({ ...imported, aliases: [], createdAt: new Date().toISOString() });
          this.#events.append({ kind: 'image.imported', data: { ...imported } });
        }
        if (alias) this.#store.images.moveAlias(digest, alias);
        return this.get(digest);
      });
      this.#indexes.add(record, { isFresh: true });
      return record;
    } catch (error) {
      if (!this.#store.images.get(digest)) await this.#removeFile(digest);
      throw error;
    }
  }

  addAlias(reference: string, alias: string): ImageRecord {
    const { digest } = this.get(reference);
    this.#store.images.moveAlias(digest, alias);
    return this.get(digest);
  }

  removeAlias(reference: string, alias: string): void {
    const { digest } = this.get(reference);
    if (this.#store.images.deleteAlias(digest, alias)) return;
    throw new AppError('not_found', `Image '${reference}' has no alias '${alias}'`, {
      kind: 'alias',
      name: alias,
    });
  }

  /** Keeps an image from being removed by who needs it and has no record yet that shows it. */
  hold(digest: ImageDigest, by: { kind: string; name: string }): Disposable {
    const hold = { digest, by };
    this.#holds.add(hold);
    return { [Symbol.dispose]: () => void this.#holds.delete(hold) };
  }

  /** Errors: `in_use` while a VM or a golden snapshot needs it. */
  async remove(reference: string): Promise<void> {
    const { digest } = this.get(reference);
    const usedBy = [...this.#holds].filter((hold) => hold.digest === digest).map(({ by }) => by);
    if (usedBy.length > 0) {
      const first = `${usedBy[0]!.kind} ${usedBy[0]!.name}`;
      throw new AppError('in_use', `Cannot delete image ${digest}: ${first} needs it.`, { usedBy });
    }
    // The record goes first: from then on nobody can start to use the file.
    this.#store.transact(() => {
      this.#store.images.delete(digest);
      this.#events.append({ kind: 'image.deleted', data: { digest } });
    });
    this.#indexes.remove(digest);
    await this.#removeFile(digest);
  }

  async #removeFile(digest: ImageDigest): Promise<void> {
    const removal = removeImage(this.#paths.images, digest).finally(() => this.#removals.delete(digest));
    this.#removals.set(digest, removal);
    await removal;
  }

  /** Takes away what a daemon that died had left half-written, and has missing indexes made. */
  async recover(): Promise<void> {
    await cleanLeftovers(this.#paths.images);
    // A file whose record was never written, or already deleted, when the daemon died.
    for (const image of await listImages(this.#paths.images)) {
      if (this.#store.images.get(image.digest)) this.#indexes.add(image);
      else await removeImage(this.#paths.images, image.digest);
    }
  }
}

const aliasTaken = (alias: string): AppError =>
  new AppError('name_taken', `There is an image '${alias}' already`, { kind: 'image', name: alias });
