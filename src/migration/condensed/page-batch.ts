/** Pages on their way into a batch, with their content, in the order in which they came. */
import { pageBytes } from '../../stream/index.ts';
import { maxRuns } from './batch.ts';
import { batchPages } from './frames.ts';

/** `data` counts the pages with content; runs of zero pages have none. */
export interface Entry {
  page: number;
  zeroPages: number;
}

export class PageBatch {
  readonly content: Buffer = Buffer.from(new ArrayBuffer(batchPages * pageBytes));
  /** Pages with content are numbered in order of their entries. */
  readonly entries: Entry[] = [];
  dataPages = 0;

  get isEmpty(): boolean {
    return this.entries.length === 0;
  }

  get isFull(): boolean {
    return this.dataPages >= batchPages || this.entries.length >= maxRuns;
  }

  addPage(page: number, from: Uint8Array, at: number): void {
    this.content.set(from.subarray(at, at + pageBytes), this.dataPages * pageBytes);
    this.entries.push({ page, zeroPages: 0 });
    this.dataPages += 1;
  }

  addZero(page: number): void {
    const last = this.entries.at(-1);
    if (last && last.zeroPages > 0 && last.page + last.zeroPages === page) last.zeroPages += 1;
    else this.entries.push({ page, zeroPages: 1 });
  }

  clear(): void {
    this.entries.length = 0;
    this.dataPages = 0;
  }
}
