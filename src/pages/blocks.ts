/**
 * Blocks of 4 KiB, the unit of guest memory and of everything that both ends may already hold, and their digests.
 *
 * The digest is BLAKE3-256 of the content. Content comes from guests, so it must be strong; and every page of a
 * migration passes here, so it must be quick: see `npm run bench:pages` for it beside what node:crypto has.
 */
import { blake3, blake3UrlSafeBase64 } from '@napi-rs/blake-hash';

export const blockBytes = 4096;
export const digestBytes = 32;
/** Stands for 'not in this set' where a block number is wanted. */
export const noBlock = 0xffff_ffff;

const zeros = Buffer.alloc(blockBytes);

/** BLAKE3-256 of any bytes. */
export const digestOf = (bytes: Uint8Array): Buffer => blake3(asBuffer(bytes));

/**
 * The digests of the whole blocks in `bytes`, 32 bytes each, one after the other. As text on the way: a buffer that the
 * library makes takes longer, for each of them is memory outside of the heap with an end of its own.
 */
export function digestBlocks(bytes: Uint8Array): Buffer {
  const blocks = Math.floor(bytes.length / blockBytes);
  const digests = Buffer.allocUnsafe(blocks * digestBytes);
  const source = asBuffer(bytes);
  for (let i = 0; i < blocks; i += 1) {
    const digest = blake3UrlSafeBase64(source.subarray(i * blockBytes, (i + 1) * blockBytes));
    digests.write(digest, i * digestBytes, 'base64url');
  }
  return digests;
}

/** Whether the block that begins at `at` is all zeroes. Most that are not show it in their first bytes. */
export function isZeroBlock(bytes: Uint8Array, at = 0): boolean {
  for (let i = at; i < at + 16; i += 1) if (bytes[i] !== 0) return false;
  return zeros.compare(bytes, at, at + blockBytes) === 0;
}

const asBuffer = (bytes: Uint8Array): Buffer =>
  Buffer.isBuffer(bytes) ? bytes : Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length);
