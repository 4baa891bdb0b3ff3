/**
 * Where the blocks of a disk are that relays hold: a manifest as of memory, with a block for a page. The VM writes while
 * its disk goes to relays, so a block may be in several slabs, of which the one with the highest number is right.
 */
import { BlockTable, pageBytes } from '../../stream/index.ts';
import type { Layout } from '../condensed/handshake.ts';
import type { Division } from './division.ts';
import { Manifest } from './manifest.ts';

export class DiskManifest extends Manifest {
  override isGood(block: number, slab: number): boolean {
    return slab >= (this.whereIs(block)?.slab.slab ?? 0);
  }
}

/** A disk as the one block of a memory. Its last block may reach beyond its end. */
export function diskLayout(sizeBytes: number): Layout {
  const blocks = Math.ceil(sizeBytes / pageBytes);
  return { sectionId: 0, table: new BlockTable([{ name: 'disk', sizeBytes: blocks * pageBytes }]) };
}

export const newDiskManifest = (division: Division, sizeBytes: number): DiskManifest =>
  new DiskManifest(division, diskLayout(sizeBytes));
