/**
 * The stream of a QEMU that runs a pre-copy, as the source's agent takes it apart: pages go to it, what is not pages is kept
 * until it is due. A stream that holds what we do not know goes on as it is, which is noticed before the first page.
 */
import { type BlockTable, StreamParser } from '../../stream/index.ts';

/** What becomes of it. */
export interface PrecopyParts {
  blocks: (table: BlockTable) => void;
  /** All before the first page is known: the opening of the stream, and the number of the section of RAM. */
  layout: (opening: Buffer, sectionId: number) => void;
  page: (page: number, buffer: Buffer, at: number) => void;
  zeroPage: (page: number) => void;
  command: (code: number, payload: Uint8Array) => void;
}

export class QemuPrecopy {
  readonly #parser: StreamParser;
  /** The stream so far, until the table of blocks was in it: up to there it can go on as it is. */
  #preamble: Buffer[] | undefined = [];
  #opening: Buffer = Buffer.alloc(0);
  #sectionId = 0;
  #tail: Buffer[] = [];
  #hasSectionEnded = false;

  constructor(parts: PrecopyParts) {
    this.#parser = new StreamParser({
      opening: (bytes) => {
        this.#opening = Buffer.from(bytes);
      },
      blocks: parts.blocks,
      sectionBegins: (_kind, id) => {
        this.#sectionId = id;
      },
      sectionEnds: (kind) => {
        if (kind === 'start') {
          this.#preamble = undefined;
          parts.layout(this.#opening, this.#sectionId);
        }
        this.#hasSectionEnded = true;
      },
      page: parts.page,
      zeroPage: parts.zeroPage,
      command: parts.command,
      tail: (bytes) => this.#tail.push(Buffer.from(bytes)),
    });
  }

  /** Bytes that are not understood, with all before them, and why; from then on the stream is to go on as it is. */
  push(bytes: Uint8Array): { rest: readonly Buffer[]; reason: string } | undefined {
    this.#preamble?.push(Buffer.from(bytes));
    try {
      this.#parser.push(bytes);
      return undefined;
    } catch (error) {
      if (!this.#preamble) throw error;
      return { rest: this.#preamble, reason: (error as Error).message };
    }
  }

  /** Whether a section, which QEMU ends after a few pages, has ended since this was asked last. */
  takeSectionEnd(): boolean {
    const hasEnded = this.#hasSectionEnded;
    this.#hasSectionEnded = false;
    return hasEnded;
  }

  /** Throws for a stream that broke off. */
  end(): void {
    this.#parser.end();
  }

  /** The state of the devices and all else behind the last page. */
  takeTail(): Buffer {
    return Buffer.concat(this.#tail.splice(0));
  }
}
