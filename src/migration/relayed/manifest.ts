/**
 * Where each page is that the destination lacks: in which slab, and who holds it; or that it is zero. It can be written
 * to a file and read again, so that a daemon that starts anew goes on merging without the source.
 *
 *   u32 length of the head, JSON head: what both ends know of the VM's memory and of the relays, with the key
 *   then frames, STALE if it came, SLAB and BORROWED, ALIKE and ZEROES
 */
import { agentError, FrameReader, frame } from '../condensed/frames.ts';
import { type Layout, parseLayout } from '../condensed/handshake.ts';
import { PageSet } from '../condensed/page-set.ts';
import {
  type Alike,
  bytesOf,
  type Division,
  divisionJson,
  divisionOf,
  encodeAlike,
  encodeSlab,
  encodeStale,
  encodeZeroes,
  parseAlike,
  parseBorrowed,
  parseRuns,
  parseSlab,
  parseStale,
  partOf,
  type Run,
  type Slab,
  type Stale,
} from './division.ts';

interface Place {
  slab: number;
  page: number;
}

interface Sharer {
  page: number;
  /** Of the ALIKE that says so. */
  number: number;
}

export class Manifest {
  readonly division: Division;
  readonly layout: Layout;
  /** Known to be zero. */
  readonly zeroes: PageSet;
  readonly #slabs = new Map<number, Slab>();
  /** In the order in which they came, which is about that of their pages. */
  readonly #order: Slab[] = [];
  /** By page: the number of the slab, or of the ALIKE, that it is in; 0 where it is in none. */
  readonly #numberOf: Uint32Array;
  /** By number, by page. */
  readonly #alike = new Map<number, Map<number, Place>>();
  /** By slab, by page there. */
  readonly #sharers = new Map<number, Map<number, Sharer[]>>();
  #stale: Stale | undefined;
  readonly #stalePages: PageSet;

  constructor(division: Division, layout: Layout) {
    this.division = division;
    this.layout = layout;
    this.zeroes = new PageSet(layout.table.pages);
    this.#numberOf = new Uint32Array(layout.table.pages);
    this.#stalePages = new PageSet(layout.table.pages);
  }

  get slabs(): readonly Slab[] {
    return this.#order;
  }

  /** What was said of these pages so far, or will yet be of slabs before that number, does not hold. Said once. */
  addStale(stale: Stale): void {
    if (this.#stale) throw agentError('stale pages twice');
    this.#stale = stale;
    for (const [first, count] of stale.runs) {
      this.#stalePages.addRange(first, count);
      for (let page = first; page < first + count; page++) {
        if (this.#numberOf[page]! < stale.slab) this.#numberOf[page] = 0;
        this.zeroes.delete(page);
      }
    }
  }

  /** Whether what the slab has of the page is what the page is. */
  isGood(page: number, slab: number): boolean {
    return slab >= (this.#stale?.slab ?? 0) || !this.#stalePages.has(page);
  }

  /** A page that is in several slabs, or like pages in several, is taken from the one with the highest number. */
  add(slab: Slab): void {
    if (this.#slabs.has(slab.slab)) throw agentError(`slab ${slab.slab} twice`);
    this.#slabs.set(slab.slab, slab);
    this.#order.push(slab);
    if (slab.isBorrowed) return;
    for (const [first, count] of slab.runs)
      for (let page = first; page < first + count; page++)
        if (this.#numberOf[page]! < slab.slab && this.isGood(page, slab.slab))
          this.#numberOf[page] = slab.slab;
  }

  addZeroes(runs: readonly Run[]): void {
    for (const [first, count] of runs) this.zeroes.addRange(first, count);
  }

  addAlike({ number, pages }: Alike): void {
    if (this.#alike.has(number)) throw agentError(`alike pages ${number} twice`);
    this.#alike.set(number, new Map(pages.map(({ page, slab, like }) => [page, { slab, page: like }])));
    for (const { page, slab, like } of pages) {
      if (this.#numberOf[page]! < number && this.isGood(page, number)) this.#numberOf[page] = number;
      const ofSlab = this.#sharers.get(slab) ?? new Map<number, Sharer[]>();
      this.#sharers.set(slab, ofSlab);
      ofSlab.set(like, [...(ofSlab.get(like) ?? []), { page, number }]);
    }
  }

  /** The slab that the page's content is in, and as which page. */
  whereIs(page: number): { slab: Slab; page: number } | undefined {
    const number = this.#numberOf[page]!;
    const place = this.#alike.get(number)?.get(page) ?? { slab: number, page };
    const slab = this.#slabs.get(place.slab);
    return slab && hasPage(slab, place.page) ? { slab, page: place.page } : undefined;
  }

  /** Pages that are what the slab has as this one, as far as that is good: it itself, and those that are like it. */
  pagesOf(slab: number, page: number): number[] {
    const isOwn = !this.#slabs.get(slab)?.isBorrowed && this.isGood(page, slab);
    return [...(isOwn ? [page] : []), ...this.#goodOf(this.#sharers.get(slab)?.get(page) ?? [])];
  }

  /** Whether another VM has put it there; see `Slab`. */
  isBorrowed(slab: number): boolean {
    return this.#slabs.get(slab)?.isBorrowed === true;
  }

  /** Pages that have the content of this one in the slab, as far as that is good; by the page in the slab. */
  sharersOf(slab: number): [like: number, pages: number[]][] {
    const known = this.#slabs.get(slab);
    return [...(this.#sharers.get(slab) ?? [])]
      .filter(([like]) => known && hasPage(known, like))
      .map(([like, sharers]) => [like, this.#goodOf(sharers)]);
  }

  #goodOf(sharers: readonly Sharer[]): number[] {
    return sharers.filter(({ page, number }) => this.isGood(page, number)).map(({ page }) => page);
  }

  covers(page: number): boolean {
    return this.whereIs(page) !== undefined || this.zeroes.has(page);
  }

  /** The first of these pages of which nobody knows where it is; -1 if there is none. */
  firstUncovered(missing: PageSet): number {
    for (let page = missing.next(0); page >= 0; page = missing.next(page + 1))
      if (!this.covers(page)) return page;
    return -1;
  }

  toBytes(): Buffer {
    const { sectionId, table } = this.layout;
    const blocks = table.blocks.map(({ name, sizeBytes }) => ({ name, sizeBytes }));
    const head = Buffer.from(JSON.stringify({ sectionId, blocks, division: divisionJson(this.division) }));
    const length = Buffer.alloc(4);
    length.writeUInt32BE(head.length);
    const zeroes = this.zeroes.size > 0 ? [encodeZeroes(this.zeroes.runs())] : [];
    const stale = this.#stale ? [encodeStale(this.#stale)] : [];
    const alike = [...this.#alike].map(([number, pages]) =>
      encodeAlike({
        number,
        pages: [...pages].map(([page, place]) => ({ page, slab: place.slab, like: place.page })),
      }),
    );
    return Buffer.concat([length, head, ...stale, ...this.#order.map(encodeSlab), ...alike, ...zeroes]);
  }

  /** Throws when it is not whole. */
  static fromBytes(bytes: Buffer): Manifest {
    const end = bytes.length < 4 ? Number.POSITIVE_INFINITY : 4 + bytes.readUInt32BE(0);
    if (end > bytes.length) throw agentError('a manifest without a head');
    const head = bytes.subarray(4, end);
    const { division } = JSON.parse(head.toString('utf8'));
    // Of the class that it is asked of.
    const manifest = new this(divisionOf(division), parseLayout(head));
    const { pages } = manifest.layout.table;
    const reader = new FrameReader();
    reader.push(bytes.subarray(end));
    let read = end;
    for (let next = reader.next(); next; next = reader.next()) {
      read += 5 + next.body.length;
      if (next.type === frame.slab) manifest.add(parseSlab(next.body, pages, manifest.division));
      else if (next.type === frame.borrowed) manifest.add(parseBorrowed(next.body, manifest.division));
      else if (next.type === frame.alike) manifest.addAlike(parseAlike(next.body, pages));
      else if (next.type === frame.stale) manifest.addStale(parseStale(next.body, pages));
      else if (next.type === frame.zeroes) manifest.addZeroes(parseRuns(next.body, pages));
      else throw agentError(`a frame of type ${next.type} in a manifest`);
    }
    if (read !== bytes.length) throw agentError('a manifest that is cut short');
    return manifest;
  }

  /** Sealed bytes of all slabs, each counted once; of borrowed ones those parts that are of use. */
  get sealedBytes(): number {
    return this.#order.reduce(
      (sum, slab) => sum + bytesOf(slab.isBorrowed ? this.#usedOf(slab) : slab.parts),
      0,
    );
  }

  #usedOf(slab: Slab): number[] {
    const used = new Set(
      this.sharersOf(slab.slab).map(([like]) => partOf(slab, like, this.division.partPages)),
    );
    return slab.parts.filter((_, part) => used.has(part));
  }
}

const hasPage = ({ runs }: Slab, page: number): boolean =>
  runs.some(([first, count]) => page >= first && page < first + count);
