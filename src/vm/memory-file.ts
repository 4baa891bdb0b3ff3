/**
 * Captured memory as a file: QEMU's migration stream, plain or in zstd; a reader tells them apart by the first
 * bytes. zstd halves the file and doubles the time that it takes, both ways, so plain is the default. A file is
 * whole or not there: it is written beside its name and renamed when it is on the disk.
 */
import { createReadStream, createWriteStream } from 'node:fs';
import { open, rename, rm, stat } from 'node:fs/promises';
import { createConnection, createServer, type Server, type Socket } from 'node:net';
import { pipeline } from 'node:stream/promises';
import { constants, createZstdCompress, createZstdDecompress } from 'node:zlib';
import { AppError, asAppError } from '../model/errors.ts';
import { KiB } from '../model/units.ts';
import { withDeadline } from '../qmp/index.ts';
import type { Machine } from './machine.ts';
import { type Captured, type CaptureOptions, captureMemory, listenForMemory } from './memory.ts';

const chunkBytes = 512 * KiB;
const zstdMagic = Buffer.from([0x28, 0xb5, 0x2f, 0xfd]);
/** QEMU migration/savevm.c: QEMU_VM_FILE_MAGIC. */
const qemuMagic = Buffer.from('QEVM');

/** As `captureMemory`, into a new file. On failure there is no file. */
export async function captureMemoryToFile(
  machine: Machine,
  options: Omit<CaptureOptions, 'socketPath'> & { file: string; compress?: boolean },
): Promise<Captured & { fileBytes: number }> {
  const { file, compress = false, signal } = options;
  const partial = `${file}.partial`;
  const socketPath = machine.paths.capture;
  await using undo = new AsyncDisposableStack();
  undo.defer(() => rm(partial, { force: true }));
  await rm(socketPath, { force: true });
  const { server, connection } = await listen(socketPath);
  undo.defer(async () => {
    server.close();
    await rm(socketPath, { force: true });
  });
  // It ends the writer too when the capture fails before QEMU has even connected.
  const over = new AbortController();
  undo.defer(() => over.abort());
  const writing = connection.then((socket) => writeFile(socket, partial, compress, over.signal));
  let failure: Error | undefined;
  writing.catch((error) => {
    failure = error;
  });
  try {
    const captured = await captureMemory(machine, { ...options, socketPath });
    await withDeadline(writing, { signal, onTimeout: () => new Error('unreachable') });
    await rename(partial, file);
    return { ...captured, fileBytes: (await stat(file)).size };
  } catch (error) {
    // A file that cannot be written shows to QEMU as a reader that went away.
    throw failure ? cannotWrite(file, failure) : error;
  }
}

/** Loads a file into a machine that was launched with `incoming`; the VM stays paused. */
export async function loadMemoryFromFile(
  machine: Machine,
  options: { file: string; signal?: AbortSignal; timeoutMs?: number },
): Promise<void> {
  const { file, signal } = options;
  const isCompressed = await readFormat(file);
  const { socketPath, loaded } = await listenForMemory(machine, options);
  const socket = createConnection({ path: socketPath });
  const source = createReadStream(file, { highWaterMark: chunkBytes });
  const reading = isCompressed
    ? pipeline(source, createZstdDecompress({ chunkSize: chunkBytes }), socket, { signal })
    : pipeline(source, socket, { signal });
  // QEMU closes its end when it has what it needs or cannot go on; only its own word counts, below.
  const read = reading.catch((error) => error as Error);
  try {
    await loaded;
  } catch (error) {
    // After a timeout QEMU may still hold its end, and the reading would wait for it.
    socket.destroy();
    const failure = await read;
    if (failure instanceof Error && 'code' in failure && String(failure.code).startsWith('ZSTD')) {
      throw new AppError(
        'image_corrupt',
        `The memory file ${file} is damaged: ${failure.message}`,
        {},
        { cause: error },
      );
    }
    throw asAppError(error);
  } finally {
    socket.destroy();
  }
}

function cannotWrite(file: string, error: NodeJS.ErrnoException): Error {
  if (error.code !== 'ENOSPC') return error;
  return new AppError(
    'insufficient_space',
    `No room to write the memory of the VM to ${file}`,
    {},
    { cause: error },
  );
}

async function readFormat(file: string): Promise<boolean> {
  const handle = await open(file, 'r');
  try {
    const { buffer, bytesRead } = await handle.read(Buffer.alloc(4), 0, 4, 0);
    const magic = buffer.subarray(0, bytesRead);
    if (magic.equals(zstdMagic)) return true;
    if (magic.equals(qemuMagic)) return false;
    throw new AppError(
      'image_corrupt',
      `${file} is not the memory of a VM: it begins with ${magic.toString('hex')}`,
    );
  } finally {
    await handle.close();
  }
}

/** A server for one connection. */
async function listen(path: string): Promise<{ server: Server; connection: Promise<Socket> }> {
  const { promise, resolve } = Promise.withResolvers<Socket>();
  const server = createServer({ highWaterMark: chunkBytes }, (socket) => {
    server.close();
    resolve(socket);
  });
  const listening = Promise.withResolvers<void>();
  server.once('error', listening.reject);
  server.listen(path, listening.resolve);
  await listening.promise;
  return { server, connection: promise };
}

async function writeFile(
  socket: Socket,
  path: string,
  compress: boolean,
  signal: AbortSignal,
): Promise<void> {
  const target = createWriteStream(path, { mode: 0o600, flush: true, highWaterMark: 4 * chunkBytes });
  if (!compress) return pipeline(socket, target, { signal });
  const zstd = createZstdCompress({
    chunkSize: chunkBytes,
    params: { [constants.ZSTD_c_compressionLevel]: 1, [constants.ZSTD_c_checksumFlag]: 1 },
  });
  return pipeline(socket, zstd, target, { signal });
}
