/**
 * The RAM blocks of a VM with all their pages numbered through, in the order in which the stream names them. Both ends
 * of a migration have the same table, so a page is one number between them.
 */
import { pageBytes } from './layout.ts';

export interface RamBlock {
  name: string;
  sizeBytes: number;
  /** The number of its first page. */
  firstPage: number;
  pages: number;
}

export class BlockTable {
  readonly blocks: readonly RamBlock[];
  readonly pages: number;

  constructor(sizes: readonly { name: string; sizeBytes: number }[]) {
    let firstPage = 0;
    this.blocks = sizes.map(({ name, sizeBytes }) => {
      const block = { name, sizeBytes, firstPage, pages: sizeBytes / pageBytes };
      firstPage += block.pages;
      return block;
    });
    this.pages = firstPage;
  }

  indexOf(name: string): number {
    return this.blocks.findIndex((block) => block.name === name);
  }

  /** The index of the block in which page number `page` lies; -1 outside of all. */
  blockOf(page: number): number {
    for (let index = 0; index < this.blocks.length; index++) {
      const { firstPage, pages } = this.blocks[index]!;
      if (page >= firstPage && page < firstPage + pages) return index;
    }
    return -1;
  }
}
