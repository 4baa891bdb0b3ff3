/**
 * What the custodian of a VM is given, as one piece of bytes: facts about it (JSON), the manifest with the key, and what
 * QEMU is to be told before and after the pages. Each with its length (u32, big-endian) before it.
 */

import { agentError } from '../condensed/frames.ts';
import type { WholeStream } from './memory-merging.ts';

export interface EscrowBytes {
  facts: Buffer;
  manifest: Buffer;
  whole: WholeStream;
}

/** Of the VMs that Viper runs: 16 bytes for each page, and then some. */
export const mostEscrowBytes = 512 * 1024 * 1024;

export function encodeEscrow({ facts, manifest, whole }: EscrowBytes): Buffer {
  return Buffer.concat(
    [facts, manifest, whole.opening, whole.tail].flatMap((piece) => {
      const length = Buffer.alloc(4);
      length.writeUInt32BE(piece.length);
      return [length, piece];
    }),
  );
}

/** Throws when it is not whole. */
export function parseEscrow(bytes: Buffer): EscrowBytes {
  let at = 0;
  const next = (): Buffer => {
    const end = at + 4 > bytes.length ? Number.POSITIVE_INFINITY : at + 4 + bytes.readUInt32BE(at);
    if (end > bytes.length) throw agentError('an escrow that is cut short');
    const piece = bytes.subarray(at + 4, end);
    at = end;
    return piece;
  };
  const escrow = { facts: next(), manifest: next(), whole: { opening: next(), tail: next() } };
  if (at !== bytes.length) throw agentError(`an escrow with ${bytes.length - at} bytes too many`);
  return escrow;
}
