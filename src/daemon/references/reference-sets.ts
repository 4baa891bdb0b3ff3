/**
 * The reference sets that this cloudlet can use in the migration of a VM, and who may use which: the base image and its
 * golden snapshots are everybody's who has a VM on it, what stayed behind is that VM's alone. Names that a peer sends are
 * judged here.
 */

import {
  indexSharedDisk,
  openSharedDisk,
  type SharedDiskOptions,
  sharedDiskSet,
} from '../../migration/condensed/shared-disk.ts';
import type { ImageDigest, Uuid } from '../../model/ids.ts';
import type { MigrationOptions, VmToMove } from '../../model/migration.ts';
import type { BlockReader, SetIndex, SetName } from '../../pages/index.ts';
import { type ImageIndexes, imageSetName } from './image-indexes.ts';
import type { KeptMemory } from './kept-memory.ts';
import type { SnapshotIndexes } from './snapshot-indexes.ts';

export interface VmOfSets {
  id: Uuid;
  image: ImageDigest;
  /** Path or URL of its disk, where it is on storage that both cloudlets see. */
  sharedDisk?: string;
}

/** Of the VM that a migration is about; `diskOf` gives path or URL of its disk, and may throw. */
export const vmOfSets = (
  vm: Pick<VmToMove, 'id' | 'image' | 'spec'>,
  { storage }: Pick<MigrationOptions, 'storage'>,
  diskOf: (vm: Pick<VmToMove, 'id' | 'spec'>) => string,
): VmOfSets => {
  const own = { id: vm.id, image: vm.image.digest };
  try {
    return storage === 'shared' ? { ...own, sharedDisk: diskOf(vm) } : own;
  } catch {
    // A storage that this cloudlet does not have: the checks say so.
    return own;
  }
};

export class ReferenceSets {
  readonly #images: ImageIndexes;
  readonly #snapshots: SnapshotIndexes;
  readonly #kept: KeptMemory;
  readonly #directory: (id: Uuid) => string;

  /** `directory`: where the files of a VM are. */
  constructor(options: {
    images: ImageIndexes;
    snapshots: SnapshotIndexes;
    kept: KeptMemory;
    directory: (id: Uuid) => string;
  }) {
    this.#directory = options.directory;
    this.#snapshots = options.snapshots;
    this.#images = options.images;
    this.#kept = options.kept;
  }

  /** What stays behind, for the engine to fill when a VM has left or come. */
  get kept(): KeptMemory {
    return this.#kept;
  }

  /** The sets whose blocks this cloudlet can read, for a destination to offer. */
  async setsFor(vm: VmOfSets): Promise<SetName[]> {
    const names: SetName[] = [];
    if (this.#images.view(vm.image).state === 'ready') names.push(imageSetName(vm.image));
    names.push(...this.#snapshots.setsFor(vm.image));
    const stayed = await this.#kept.setFor(vm.id);
    if (stayed !== undefined) names.push(stayed);
    // A disk on shared storage was a copy of its image once: where that is, to read the disk would bring little more.
    if (vm.sharedDisk !== undefined && !names.includes(imageSetName(vm.image)))
      names.push(sharedDiskSet(vm.id));
    return names;
  }

  /** Those of the offered sets that are of use in a migration from here. */
  async inCommon(vm: VmOfSets, offered: readonly SetName[]): Promise<SetName[]> {
    const elsewhere = await this.#kept.remembered(vm.id);
    const known = new Set([
      ...(await this.setsFor(vm)),
      ...(elsewhere === undefined ? [] : [elsewhere]),
      ...(vm.sharedDisk === undefined ? [] : [sharedDiskSet(vm.id)]),
    ]);
    return offered.filter((name) => known.has(name));
  }

  /** The destination's half of a set, by number to block. Undefined: not here, not sound, or not this VM's. */
  async openBlocks(vm: VmOfSets, name: SetName): Promise<BlockReader | undefined> {
    if (name === imageSetName(vm.image)) return this.#images.openBlocks(vm.image);
    if (name === sharedDiskSet(vm.id)) return this.#onDisk(vm, openSharedDisk);
    return (await this.#snapshots.openBlocks(vm.image, name)) ?? this.#kept.openBlocks(vm.id, name);
  }

  /** The source's half of a set that the destination offers, by content to number. Undefined as above. */
  async openIndex(vm: VmOfSets, name: SetName): Promise<SetIndex | undefined> {
    if (name === imageSetName(vm.image)) return this.#images.openIndex(vm.image);
    if (name === sharedDiskSet(vm.id)) return this.#onDisk(vm, (options) => indexSharedDisk(vm.id, options));
    return (await this.#snapshots.openIndex(vm.image, name)) ?? this.#kept.openIndex(vm.id, name);
  }

  async #onDisk<T>(
    { id, sharedDisk }: VmOfSets,
    open: (options: SharedDiskOptions) => Promise<T | undefined>,
  ): Promise<T | undefined> {
    return sharedDisk === undefined ? undefined : open({ disk: sharedDisk, directory: this.#directory(id) });
  }
}
