/** What the destination's QEMU says over its stream: the pages that its guest waits for, and what it was asked. */
import { AnswerParser, type BlockTable, pageBytes } from '../../stream/index.ts';
import { agentError } from './frames.ts';

export class QemuAnswers {
  readonly #table: BlockTable;
  readonly #parser: AnswerParser;
  readonly #onRequest: (pages: number[]) => void;
  /** The block of the last request. */
  #block = -1;
  readonly #pongs = new Map<number, () => void>();
  #bitmaps: ((block: number, bits: Buffer) => void) | undefined;
  #acknowledged: (() => void) | undefined;

  /** `onRequest` gets the pages of one request, in their order. */
  constructor(table: BlockTable, onRequest: (pages: number[]) => void) {
    this.#table = table;
    this.#parser = new AnswerParser(Math.max(...table.blocks.map(({ pages }) => pages)));
    this.#onRequest = onRequest;
  }

  /** Throws for what no QEMU says. */
  take(bytes: Buffer): void {
    for (const answer of this.#parser.push(bytes)) {
      if (answer.name === 'request-pages') this.#onRequest(this.#requested(answer));
      if (answer.name === 'pong') this.#pongs.get(answer.value)?.();
      if (answer.name === 'resume-ack') this.#acknowledged?.();
      if (answer.name === 'received-bitmap')
        this.#bitmaps?.(this.#table.indexOf(answer.blockName), answer.bits);
    }
  }

  /** The answer to a ping that is sent next. */
  pong(value: number): Promise<void> {
    return new Promise((resolve) => {
      this.#pongs.set(value, resolve);
    });
  }

  /** Which pages of a block QEMU has, a bit for each: the answer to the question that is sent next. */
  received(block: number): Promise<Buffer> {
    return new Promise((resolve) => {
      this.#bitmaps = (index, bits) => {
        if (index === block) resolve(bits);
      };
    });
  }

  /** QEMU's word that it goes on with a post-copy. */
  goesOn(): Promise<void> {
    return new Promise((resolve) => {
      this.#acknowledged = resolve;
    });
  }

  #requested({
    blockName,
    startByte,
    bytes,
  }: {
    blockName?: string;
    startByte: number;
    bytes: number;
  }): number[] {
    if (blockName !== undefined) this.#block = this.#table.indexOf(blockName);
    const block = this.#table.blocks[this.#block];
    if (!block) throw agentError(`a request for pages of the unknown block ${blockName}`);
    const first = block.firstPage + Math.floor(startByte / pageBytes);
    const end = Math.min(first + Math.ceil(bytes / pageBytes), block.firstPage + block.pages);
    return Array.from({ length: end - first }, (_, index) => first + index);
  }
}
