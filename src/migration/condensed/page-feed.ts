/** Writes pages to the destination QEMU as sections of its migration stream, and never more than it takes. */
import type { Writable } from 'node:stream';
import { KiB } from '../../model/units.ts';
import { type BlockTable, beginSection, PageWriter, pageBytes, sectionEnd } from '../../stream/index.ts';
import type { PageRun } from './rebuilder.ts';

/** What is written at a time: what a fault waits behind is this, and what the kernel holds. */
const chunkBytes = 128 * KiB;

export class PageFeed {
  readonly #qemu: Writable;
  readonly #sectionId: number;
  readonly #writer: PageWriter;

  constructor(qemu: Writable, sectionId: number, table: BlockTable) {
    this.#qemu = qemu;
    this.#sectionId = sectionId;
    this.#writer = new PageWriter(table);
  }

  /** Resolves when the kernel has taken it. */
  write(bytes: Buffer): Promise<void> {
    return new Promise((resolve, reject) => {
      this.#qemu.write(bytes, (error) => (error ? reject(error) : resolve()));
    });
  }

  /** Everything between sections: QEMU names blocks anew after the switch to post-copy. */
  async between(bytes: Buffer): Promise<void> {
    this.#writer.reset();
    await this.write(bytes);
  }

  async pages(runs: readonly PageRun[]): Promise<void> {
    if (runs.length === 0) return;
    let buffer = Buffer.allocUnsafe(chunkBytes);
    let at = beginSection('part', this.#sectionId).copy(buffer);
    for (const { page, count, content } of runs) {
      for (let index = 0; index < count; index++) {
        if (at + PageWriter.maxBytes > buffer.length) {
          await this.write(buffer.subarray(0, at));
          buffer = Buffer.allocUnsafe(chunkBytes);
          at = 0;
        }
        at = content
          ? this.#writer.page(buffer, at, page + index, content, index * pageBytes)
          : this.#writer.zeroPage(buffer, at, page + index);
      }
    }
    await this.write(Buffer.concat([buffer.subarray(0, at), sectionEnd(this.#sectionId)]));
  }

  /** The last section of RAM; pages have come before it. */
  end(): Promise<void> {
    return this.write(Buffer.concat([beginSection('end', this.#sectionId), sectionEnd(this.#sectionId)]));
  }
}
