/**
 * A reference set is a list of 4 KiB blocks that both ends of a migration hold, such as the content of a base
 * image. Its name says what it is *and* holds the digest of what it is made from, so equal names mean equal blocks.
 *
 * The two ends need different halves of it. The source asks an index 'which block has this content?' and sends the
 * number instead of the content; it need not hold the content itself. The destination reads blocks by number.
 * The destination judges every batch by a digest over what it has put together, so a set that lies (a stale index, a
 * file changed behind our back) costs bytes and never correctness.
 */

/** Such as `image:sha256:HEX`: at most 255 printable ASCII characters, see `isSetName`. */
export type SetName = string;

export const isSetName = (text: string): boolean => /^[a-z]+:[!-~]{1,240}$/.test(text);

/** The source's half. */
export interface SetIndex extends AsyncDisposable {
  /** Distinct contents that it knows. */
  readonly entries: number;
  /**
   * The block numbers for digests that lie one after the other (32 bytes each); `noBlock` where the set has no such
   * content. Full digests are compared. Ask for many at once: that is what makes it quick.
   */
  lookup(digests: Uint8Array): Promise<Uint32Array>;
}

/** The destination's half. */
export interface BlockReader extends AsyncDisposable {
  /** Numbers run from 0 to one less than this. */
  readonly blockCount: number;
  /**
   * The content of these blocks in the order asked for, 4 KiB each; valid until the next call, of which one is made at
   * a time. What lies close together is read at once. Throws `invalid_request` for a number out of range;
   * `image_corrupt` where the file does not have the block.
   */
  read(blocks: Uint32Array): Promise<Buffer>;
}

/** What an index is built from: content in ascending order, holes left out. */
export interface BlockSource {
  readonly blockCount: number;
  /**
   * Pieces of whole blocks, at most `maxPieceBlocks` each. They are given away: a piece with an `ArrayBuffer` of its
   * own goes to another thread without being copied.
   */
  pieces(signal: AbortSignal): AsyncIterable<Piece>;
}

export interface Piece {
  /** Number of its first block. */
  first: number;
  bytes: Buffer;
}

export const maxPieceBlocks = 256;
