/**
 * Where each page is that the destination lacks: in which slab, and who holds it; or that it is zero. It can be written
 * to a file and read again, so that a daemon that starts anew goes on merging without the source.
 *
 *   u32 length of the head, JSON head: what both ends know of the VM's memory and of the relays, with the key
 *   then frames, SLAB and ZEROES, as they came
 */
import { agentError, FrameReader, frame } from '../condensed/frames.ts';
import { type Layout, parseLayout } from '../condensed/handshake.ts';
import { PageSet } from '../condensed/page-set.ts';
import {
  bytesOf,
  type Division,
  divisionJson,
  divisionOf,
  encodeSlab,
  encodeZeroes,
  parseRuns,
  parseSlab,
  type Run,
  type Slab,
} from './division.ts';

export class Manifest {
  readonly division: Division;
  readonly layout: Layout;
  /** Known to be zero. */
  readonly zeroes: PageSet;
  readonly #slabs = new Map<number, Slab>();
  /** In the order in which they came, which is about that of their pages. */
  readonly #order: Slab[] = [];
  /** By page; 0 where it is in none. */
  readonly #slabOf: Uint32Array;

  constructor(division: Division, layout: Layout) {
    this.division = division;
    this.layout = layout;
    this.zeroes = new PageSet(layout.table.pages);
    this.#slabOf = new Uint32Array(layout.table.pages);
  }

  get slabs(): readonly Slab[] {
    return this.#order;
  }

  /** A page that is in several slabs is taken from the last. */
  add(slab: Slab): void {
    if (this.#slabs.has(slab.slab)) throw agentError(`slab ${slab.slab} twice`);
    this.#slabs.set(slab.slab, slab);
    this.#order.push(slab);
    for (const [first, count] of slab.runs) this.#slabOf.fill(slab.slab, first, first + count);
  }

  addZeroes(runs: readonly Run[]): void {
    for (const [first, count] of runs) this.zeroes.addRange(first, count);
  }

  /** The slab that the page is in. */
  slabOf(page: number): Slab | undefined {
    return this.#slabs.get(this.#slabOf[page]!);
  }

  covers(page: number): boolean {
    return this.#slabOf[page] !== 0 || this.zeroes.has(page);
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
    return Buffer.concat([length, head, ...this.#order.map(encodeSlab), ...zeroes]);
  }

  /** Throws when it is not whole. */
  static fromBytes(bytes: Buffer): Manifest {
    const end = bytes.length < 4 ? Number.POSITIVE_INFINITY : 4 + bytes.readUInt32BE(0);
    if (end > bytes.length) throw agentError('a manifest without a head');
    const head = bytes.subarray(4, end);
    const { division } = JSON.parse(head.toString('utf8'));
    const manifest = new Manifest(divisionOf(division), parseLayout(head));
    const { pages } = manifest.layout.table;
    const reader = new FrameReader();
    reader.push(bytes.subarray(end));
    let read = end;
    for (let next = reader.next(); next; next = reader.next()) {
      read += 5 + next.body.length;
      if (next.type === frame.slab) manifest.add(parseSlab(next.body, pages, manifest.division));
      else if (next.type === frame.zeroes) manifest.addZeroes(parseRuns(next.body, pages));
      else throw agentError(`a frame of type ${next.type} in a manifest`);
    }
    if (read !== bytes.length) throw agentError('a manifest that is cut short');
    return manifest;
  }

  /** Sealed bytes of all slabs, each counted once. */
  get sealedBytes(): number {
    return this.#order.reduce((sum, { parts }) => sum + bytesOf(parts), 0);
  }
}
