/**
 * The store of image files. An image never changes: its name is the digest of its bytes, its file is read-only.
 *
 *   ROOT/tmp/UUID/disk          an import at work, or an image on its way out
 *   ROOT/partial/sha256-HEX     see `partial-images.ts`
 *   ROOT/sha256-HEX/disk.FORMAT a whole, checked image
 *
 * Invariant: a directory under its digest appears and goes in one rename, so what stands there is whole, whenever
 * the daemon was killed. Which images there are by name is in the daemon's records, not here.
 */
import { createHash } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { mkdir, open, readdir, rename, rm, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { AppError } from '../model/errors.ts';
import { type ImageDigest, isImageDigest, newId } from '../model/ids.ts';
import { throwIfCancelled } from './cancel.ts';
import { checkImage, type ImageFacts, type ImageFormat } from './image-check.ts';
import { prunePartials, takePartial } from './partial-images.ts';
import { type ReceiveOptions, receive } from './receive.ts';
import { defaultReserveBytes } from './space.ts';

export type { ImageFormat } from './image-check.ts';

export interface ImportOptions extends Omit<ReceiveOptions, 'reserveBytes'> {
  /** Refused with `digest_mismatch` when the bytes have another one. */
  expectedDigest?: ImageDigest;
  /** The format that the sender says it has. `raw` also admits a disk without partitions or file system. */
  format?: ImageFormat;
  /** Bytes that stay free on the disk whatever comes. */
  reserveBytes?: number;
}

export interface ImportedImage extends ImageFacts {
  digest: ImageDigest;
}

export interface StoredImage {
  digest: ImageDigest;
  format: ImageFormat;
}

/**
 * Takes an image into the store; the same bytes a second time give the same image and no second copy. On any error
 * nothing stays behind. Throws `insufficient_space`, `digest_mismatch`, `image_corrupt`, `cancelled`, `timeout`.
 */
export async function importImage(root: string, options: ImportOptions): Promise<ImportedImage> {
  const { expectedDigest, format, reserveBytes = defaultReserveBytes, signal } = options;
  const partial =
    options.onStart && expectedDigest !== undefined ? await takePartial(root, expectedDigest) : undefined;
  await using staging = partial ?? (await makeStaging(root));
  const arriving = join(staging.path, 'disk');
  const { digest } = await receive(arriving, { ...options, reserveBytes }).catch((error: unknown) => {
    if (isCut(error)) partial?.keep();
    throw error;
  });
  if (expectedDigest !== undefined && digest !== expectedDigest)
    throw new AppError(
      'digest_mismatch',
      `Import image: the bytes have ${digest}, wanted ${expectedDigest}`,
      {
        digest,
        expectedDigest,
      },
    );
  const facts = await checkImage(arriving, format, signal);
  await rename(arriving, join(staging.path, `disk.${facts.format}`));
  await syncDirectory(staging.path);
  await publish(root, staging.path, digest, facts.format, signal);
  return { digest, ...facts };
}

/** The bytes that have come are good, as far as anybody knows, and are still wanted. */
const isCut = (error: unknown): boolean =>
  error instanceof AppError && ['interrupted', 'peer_unreachable', 'timeout'].includes(error.code);

/** Path of the image's file, whether it is there or not. */
export function imageFile(root: string, digest: ImageDigest, format: ImageFormat): string {
  return join(imageDirectory(root, digest), `disk.${format}`);
}

/** The images that are there, for comparison with the daemon's records. */
export async function listImages(root: string): Promise<StoredImage[]> {
  const images: StoredImage[] = [];
  for (const name of await readdir(root).catch(emptyIfMissing)) {
    const digest = name.replace('-', ':');
    if (!isImageDigest(digest)) continue;
    const files = await readdir(join(root, name));
    const format = (['qcow2', 'raw'] as const).find((kind) => files.includes(`disk.${kind}`));
    if (format) images.push({ digest, format });
  }
  return images;
}

/**
 * Hashes the file again. Throws `image_corrupt` when its bytes are not those of its name any more, `not_found` when
 * it is gone. Importing the image again puts good bytes in its place.
 */
export async function verifyImage(
  root: string,
  digest: ImageDigest,
  format: ImageFormat,
  signal: AbortSignal,
): Promise<void> {
  const file = imageFile(root, digest, format);
  const found = await hashFile(file, signal).catch((error: unknown) => {
    throwIfCancelled(signal, 'Verify image');
    if (!isMissing(error)) throw error;
    throw new AppError('not_found', `Verify image: there is no file ${file}`, {
      kind: 'image',
      name: digest,
    });
  });
  if (found !== digest)
    throw new AppError('image_corrupt', `Verify image: the stored bytes have ${found}, wanted ${digest}`, {
      digest: found,
      expectedDigest: digest,
    });
}

/** Removes the image's file. An image that is not there is no error: it may have been removed half before. */
export async function removeImage(root: string, digest: ImageDigest): Promise<void> {
  await using staging = await makeStaging(root);
  try {
    await rename(imageDirectory(root, digest), join(staging.path, 'image'));
  } catch (error) {
    if (!isMissing(error)) throw error;
  }
  await syncDirectory(root);
}

/**
 * Removes what a killed daemon left half done and gives how many pieces these were. Only for the start: an import
 * at work would lose its file.
 */
export async function cleanLeftovers(root: string): Promise<number> {
  const staging = join(root, 'tmp');
  await prunePartials(root);
  const names = await readdir(staging).catch(emptyIfMissing);
  for (const name of names) await rm(join(staging, name), { recursive: true, force: true });
  return names.length;
}

/** Moves the staged image under its digest. An image that is there already stays, unless its bytes have decayed. */
async function publish(
  root: string,
  staged: string,
  digest: ImageDigest,
  format: ImageFormat,
  signal: AbortSignal,
): Promise<void> {
  try {
    await rename(staged, imageDirectory(root, digest));
  } catch (error) {
    const code = (error as NodeJS.ErrnoException).code;
    if (code !== 'ENOTEMPTY' && code !== 'EEXIST') throw error;
    const whole = await verifyImage(root, digest, format, signal).then(
      () => true,
      () => false,
    );
    throwIfCancelled(signal, 'Import image');
    if (!whole) await rename(join(staged, `disk.${format}`), imageFile(root, digest, format));
  }
  await syncDirectory(imageDirectory(root, digest));
  await syncDirectory(root);
}

async function makeStaging(root: string): Promise<AsyncDisposable & { path: string }> {
  const path = join(root, 'tmp', newId());
  await mkdir(path, { recursive: true, mode: 0o750 });
  return { path, [Symbol.asyncDispose]: () => rm(path, { recursive: true, force: true }) };
}

function imageDirectory(root: string, digest: ImageDigest): string {
  if (!isImageDigest(digest))
    throw new AppError(
      'invalid_request',
      `Find image: digest is '${digest}', wanted sha256: and 64 hex digits`,
      {
        problems: [{ field: 'digest', value: digest, wanted: 'sha256: and 64 hex digits' }],
      },
    );
  return join(root, digest.replace(':', '-'));
}

async function hashFile(file: string, signal: AbortSignal): Promise<ImageDigest> {
  await stat(file);
  const hash = createHash('sha256');
  for await (const chunk of createReadStream(file, { signal, highWaterMark: 1024 * 1024 }))
    hash.update(chunk);
  return `sha256:${hash.digest('hex')}`;
}

/** Without this a rename may be lost by a power cut. */
async function syncDirectory(path: string): Promise<void> {
  await using handle = await open(path, 'r');
  await handle.sync();
}

const isMissing = (error: unknown): boolean => (error as NodeJS.ErrnoException).code === 'ENOENT';

function emptyIfMissing(error: unknown): string[] {
  if (isMissing(error)) return [];
  throw error;
}
