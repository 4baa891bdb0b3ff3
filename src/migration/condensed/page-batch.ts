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
  readonly content: Buffer;
  /** Pages with content are numbered in order of their entries. */
  readonly entries: Entry[] = [];
  dataPages = 0;

  /** With content it has so many pages at the most. */
  constructor(mostPages = batchPages) {
    this.content = Buffer.from(new ArrayBuffer(mostPages * pageBytes));
  }

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

  /** Runs of zero pages, which then are not in it any more. */
  takeZeroes(): [number, number][] {
    const zeroes = this.entries.filter(({ zeroPages }) => zeroPages > 0);
    const others = this.entries.filter(({ zeroPages }) => zeroPages === 0);
    this.entries.splice(0, this.entries.length, ...others);
    return zeroes.map(({ page, zeroPages }) => [page, zeroPages]);
  }

  /** Its pages with content for which `isTheirs` holds, by their numbers, go to the other batch; no zeroes are in it. */
  move(isTheirs: readonly boolean[], to: PageBatch): void {
    const entries = this.entries.splice(0);
    const content = this.content;
    this.dataPages = 0;
    for (const [index, { page }] of entries.entries()) {
      const batch = isTheirs[index] ? to : this;
      // Within this one nothing is moved behind where it was.
      batch.addPage(page, content, index * pageBytes);
    }
  }

  /** Copies of some of its pages with content; it has no others. */
  part(first: number, count: number): PageBatch {
    const pages = this.entries.slice(first, first + count);
    const part = new PageBatch(pages.length);
    for (const [index, { page }] of pages.entries())
      part.addPage(page, this.content, (first + index) * pageBytes);
    return part;
  }

  /** Runs of its pages with content. */
  get dataRuns(): [number, number][] {
    const runs: [number, number][] = [];
    for (const { page, zeroPages } of this.entries) {
      if (zeroPages > 0) continue;
      const last = runs.at(-1);
      if (last && last[0] + last[1] === page) last[1] += 1;
      else runs.push([page, 1]);
    }
    return runs;
  }

  clear(): void {
    this.entries.length = 0;
    this.dataPages = 0;
  }
}
