/**
 * The disks of VMs and of golden snapshots: qcow2 overlays on an image of the store. An overlay names its image by
 * a path relative to its own directory, which QEMU resolves from there, so an operator may move the whole state
 * directory. Nothing here may run on the disk of a VM that writes: stop or pause it first (pausing makes QEMU flush).
 */
import { constants } from 'node:fs';
import { chmod, copyFile, open, realpath, rename, rm, stat } from 'node:fs/promises';
import { dirname, relative, resolve } from 'node:path';
import { AppError } from '../model/errors.ts';
import { MiB } from '../model/units.ts';
import { type ImageFormat, readQcow2Header } from './image-check.ts';
import { run } from './run.ts';
import { defaultReserveBytes, explainNoSpace, requireSpace } from './space.ts';

export interface WholeFileOptions {
  /** Bytes that stay free on the host's disk. */
  reserveBytes?: number;
  signal: AbortSignal;
}

export interface CreateDiskOptions extends WholeFileOptions {
  /** Absolute path of the new overlay; its directory is there. */
  file: string;
  imageFile: string;
  imageFormat: ImageFormat;
  /** Size of the disk that the guest sees: at least the image's. */
  sizeBytes: number;
}

export interface CopyDiskOptions extends WholeFileOptions {
  from: string;
  to: string;
}

export interface DiskUsage {
  virtualBytes: number;
  fileBytes: number;
  /** What the file takes on the host's disk, holes left out. */
  allocatedBytes: number;
}

/** An overlay that nobody has written to is smaller than this. */
const emptyOverlayBytes = MiB;
const copyTimeoutMs = 60 * 60_000;

/**
 * Makes an empty overlay on the image. Throws `invalid_request` for a size below the image's, `insufficient_space`,
 * `cancelled`. On an error the file is not there.
 */
export async function createDisk(options: CreateDiskOptions): Promise<void> {
  const { file, imageFile, imageFormat, sizeBytes, reserveBytes = defaultReserveBytes, signal } = options;
  const action = 'Create disk';
  requireSize(sizeBytes, await virtualBytesOf(imageFile, imageFormat));
  await requireSpace(action, dirname(file), emptyOverlayBytes, reserveBytes);
  await whole(file, action, emptyOverlayBytes, async (making) => {
    const backing = await relativePath(making, imageFile);
    const overlay = ['-f', 'qcow2', '-F', imageFormat, '-b', backing, making, String(sizeBytes)];
    await run('qemu-img', ['create', '-q', ...overlay], { signal });
  });
}

/** Makes a disk that is empty and stands on no image, for a copy of one that does not either. */
export async function createBlankDisk(
  options: Pick<CreateDiskOptions, 'file' | 'sizeBytes'> & WholeFileOptions,
): Promise<void> {
  const { file, sizeBytes, reserveBytes = defaultReserveBytes, signal } = options;
  const action = 'Create disk';
  await requireSpace(action, dirname(file), emptyOverlayBytes, reserveBytes);
  await whole(file, action, emptyOverlayBytes, async (making) => {
    await run('qemu-img', ['create', '-q', '-f', 'qcow2', making, String(sizeBytes)], { signal });
  });
}

/**
 * Copies an overlay with its content; the copy stands on the same image. Shares the blocks where the file system can,
 * else copies what is not a hole. Throws `insufficient_space`, `cancelled`. On an error the copy is not there.
 */
export async function copyDisk(options: CopyDiskOptions): Promise<void> {
  const { from, to, reserveBytes = defaultReserveBytes, signal } = options;
  const action = 'Copy disk';
  const { backing } = await readQcow2Header(from);
  const { allocatedBytes } = await diskUsage(from);
  await whole(to, action, allocatedBytes, async (making) => {
    if (!(await shareBlocks(from, making))) {
      await requireSpace(action, dirname(to), allocatedBytes, reserveBytes);
      const copy = ['--sparse=always', '--reflink=never', '--', resolve(from), making];
      await run('cp', copy, { signal, timeoutMs: copyTimeoutMs });
    }
    if (!backing) return;
    const wanted = resolve(await realpath(dirname(from)), backing.file);
    if ((await relativePath(making, wanted)) === backing.file) return;
    await rebase(making, wanted, backing.format ?? 'qcow2', signal);
  });
}

/**
 * An overlay that came from elsewhere is set on the image as it is called here. Its content stays as it is. Throws
 * `image_corrupt` for a file that is no plain overlay.
 */
export async function rebaseDisk(
  options: Pick<CreateDiskOptions, 'file' | 'imageFile' | 'imageFormat'> & { signal: AbortSignal },
): Promise<void> {
  const { file, imageFile, imageFormat, signal } = options;
  const { backing, encrypted, externalData, corrupt } = await readQcow2Header(file);
  if (!backing || encrypted || externalData || corrupt)
    throw new AppError('image_corrupt', `Take disk ${file}: it is no plain overlay on an image`, { file });
  await rebase(file, imageFile, imageFormat, signal);
}

async function rebase(file: string, onto: string, format: string, signal: AbortSignal): Promise<void> {
  const options = ['-u', '-f', 'qcow2', '-F', format, '-b', await relativePath(file, onto), file];
  await run('qemu-img', ['rebase', '-q', ...options], { signal });
}

export async function diskUsage(file: string): Promise<DiskUsage> {
  const [{ virtualBytes }, { size, blocks }] = await Promise.all([readQcow2Header(file), stat(file)]);
  return { virtualBytes, fileBytes: size, allocatedBytes: blocks * 512 };
}

/** Removes the disk; one that is gone already is no error. */
export async function deleteDisk(file: string): Promise<void> {
  await rm(file, { force: true });
}

/**
 * Runs `make` on a file beside `file` (in the same directory, so that relative paths stay right) and moves the result
 * in place: a file under the final name is always whole.
 */
export async function whole(
  file: string,
  action: string,
  wantedBytes: number,
  make: (making: string) => Promise<void>,
): Promise<void> {
  const target = resolve(file);
  const making = `${target}.making`;
  try {
    await rm(making, { force: true });
    await make(making);
    await chmod(making, 0o640);
    await using handle = await open(making, 'r');
    await handle.sync();
    await rename(making, target);
  } catch (error) {
    await rm(making, { force: true });
    throw await explainNoSpace(error, action, dirname(target), wantedBytes);
  }
}

/** Clones by reference; false where the file system cannot, or the two are on different ones. */
async function shareBlocks(from: string, to: string): Promise<boolean> {
  try {
    await copyFile(from, to, constants.COPYFILE_FICLONE_FORCE);
    return true;
  } catch (error) {
    const code = (error as NodeJS.ErrnoException).code;
    if (
      code === undefined ||
      !['ENOTSUP', 'EOPNOTSUPP', 'EXDEV', 'EINVAL', 'ENOSYS', 'ENOTTY'].includes(code)
    )
      throw error;
    return false;
  }
}

/** The path that leads from the directory of `file` to `target`, links resolved, for the kernel resolves `..` so. */
async function relativePath(file: string, target: string): Promise<string> {
  const path = relative(await realpath(dirname(file)), await realpath(target));
  // Without the dot, a name such as `nbd:x` in it would read as a protocol.
  return path.startsWith('../') ? path : `./${path}`;
}

async function virtualBytesOf(file: string, format: ImageFormat): Promise<number> {
  return format === 'raw' ? (await stat(file)).size : (await readQcow2Header(file)).virtualBytes;
}

/** A size that the guest can have, and that holds what is there already. */
export function requireSize(sizeBytes: number, imageBytes: number): void {
  const wanted = `a multiple of 512, at least the ${imageBytes} bytes of the image`;
  if (Number.isSafeInteger(sizeBytes) && sizeBytes % 512 === 0 && sizeBytes >= imageBytes) return;
  throw new AppError('invalid_request', `Create disk: disk.sizeBytes is ${sizeBytes}, wanted ${wanted}`, {
    problems: [{ field: 'disk.sizeBytes', value: sizeBytes, wanted }],
  });
}
