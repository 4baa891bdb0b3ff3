/** Slabs as relays see them: sealed with a key of one migration, bound to their numbers. FORMAT.md tells the layout. */
import { createCipheriv, createDecipheriv, createSecretKey, type KeyObject, randomBytes } from 'node:crypto';
import { AppError } from '../model/errors.ts';
import type { Uuid } from '../model/ids.ts';

const algorithm = 'aes-256-gcm';
export const keyBytes = 32;
const tagBytes = 16;

/** For one migration, or one pool of them, and never for another: the nonces begin anew with each key. */
export const newKey = (): Buffer => randomBytes(keyBytes);

export class Seal {
  readonly #key: KeyObject;
  readonly #id: Buffer;

  constructor(key: Buffer, migrationId: Uuid) {
    if (key.length !== keyBytes) throw new Error(`Bug: a key of ${key.length} bytes`);
    this.#key = createSecretKey(key);
    this.#id = Buffer.from(migrationId.replaceAll('-', ''), 'hex');
  }

  /** The same part of the same slab must never come with another content. */
  close(slab: number, part: number, pieces: readonly Uint8Array[]): Buffer {
    const cipher = createCipheriv(
      algorithm,
      this.#key,
      Buffer.concat([Buffer.alloc(4), numbersOf(part, slab)]),
    );
    cipher.setAAD(Buffer.concat([this.#id, numbersOf(part, slab)]));
    const sealed = pieces.map((piece) => cipher.update(piece));
    return Buffer.concat([...sealed, cipher.final(), cipher.getAuthTag()]);
  }

  /** Throws `image_corrupt` when these are not the bytes that were sealed as this part of this slab. */
  open(slab: number, part: number, sealed: Uint8Array): Buffer {
    try {
      const nonce = Buffer.concat([Buffer.alloc(4), numbersOf(part, slab)]);
      const decipher = createDecipheriv(algorithm, this.#key, nonce, { authTagLength: tagBytes });
      decipher.setAAD(Buffer.concat([this.#id, numbersOf(part, slab)]));
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

function numbersOf(part: number, slab: number): Buffer {
  const bytes = Buffer.alloc(8);
  bytes.writeUInt32BE(part);
  bytes.writeUInt32BE(slab, 4);
  return bytes;
}
