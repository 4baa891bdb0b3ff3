/** Writes pages to the destination QEMU as sections of its migration stream, and never more than it takes. */
import type { Writable } from 'node:stream';
import { KiB } from '../../model/units.ts';
import { type BlockTable, beginSection, PageWriter, pageBytes, sectionEnd } from '../../stream/index.ts';
import type { PageRun } from './rebuilder.ts';

/** What is written at a time: what a fault waits behind is this, and what the kernel holds. */
const chunkBytes = 128 * KiB;
const endBytes = 64;

export class PageFeed {
  readonly #qemu: Writable;
  readonly #sectionId: number;
  readonly #writer: PageWriter;
  /** Used again and again: a write is over when the kernel has a copy. */
  readonly #chunk = Buffer.allocUnsafeSlow(chunkBytes + endBytes);

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
    const chunk = this.#chunk;
    let at = beginSection('part', this.#sectionId).copy(chunk);
    for (const { page, count, content } of runs) {
      for (let index = 0; index < count; index++) {
        if (at + PageWriter.maxBytes > chunkBytes) {
          await this.write(chunk.subarray(0, at));
          at = 0;
        }
        at = content
          ? this.#writer.page(chunk, at, page + index, content, index * pageBytes)
          : this.#writer.zeroPage(chunk, at, page + index);
      }
    }
    at += sectionEnd(this.#sectionId).copy(chunk, at);
    await this.write(chunk.subarray(0, at));
  }

  /** The last section of RAM; pages have come before it. */
  end(): Promise<void> {
    return this.write(Buffer.concat([beginSection('end', this.#sectionId), sectionEnd(this.#sectionId)]));
  }
}
