/** Slabs as relays see them: sealed with a key of one migration, bound to their number. FORMAT.md tells the layout. */
import { createCipheriv, createDecipheriv, randomBytes } from 'node:crypto';
import { AppError } from '../model/errors.ts';
import type { Uuid } from '../model/ids.ts';

const algorithm = 'aes-256-gcm';
export const keyBytes = 32;
const tagBytes = 16;

/** For one migration, and never for another: the nonces begin anew with each key. */
export const newKey = (): Buffer => randomBytes(keyBytes);

export class Seal {
  readonly #key: Buffer;
  readonly #id: Buffer;

  constructor(key: Buffer, migrationId: Uuid) {
    if (key.length !== keyBytes) throw new Error(`Bug: a key of ${key.length} bytes`);
    this.#key = key;
    this.#id = Buffer.from(migrationId.replaceAll('-', ''), 'hex');
  }

  /** The same number must never come with another content. */
  close(slab: number, pieces: readonly Uint8Array[]): Buffer {
    const cipher = createCipheriv(algorithm, this.#key, nonceOf(slab));
    cipher.setAAD(Buffer.concat([this.#id, numberOf(slab)]));
    const sealed = pieces.map((piece) => cipher.update(piece));
    return Buffer.concat([...sealed, cipher.final(), cipher.getAuthTag()]);
  }

  /** Throws `image_corrupt` when these are not the bytes that were sealed as this slab. */
  open(slab: number, sealed: Uint8Array): Buffer {
    try {
      const decipher = createDecipheriv(algorithm, this.#key, nonceOf(slab), { authTagLength: tagBytes });
      decipher.setAAD(Buffer.concat([this.#id, numberOf(slab)]));
      const end = sealed.length - tagBytes;
      decipher.setAuthTag(sealed.subarray(end));
      const first = decipher.update(sealed.subarray(0, end));
      return Buffer.concat([first, decipher.final()]);
    } catch (error) {
      throw new AppError(
        'image_corrupt',
        `Slab ${slab} is not what was given to the relay`,
        {},
        { cause: error },
      );
    }
  }
}

/** What sealing adds to a slab. */
export const sealBytes = tagBytes;

const nonceOf = (slab: number): Buffer => Buffer.concat([Buffer.alloc(8), numberOf(slab)]);

function numberOf(slab: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(slab);
  return bytes;
}
