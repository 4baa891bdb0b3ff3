/**
 * Captured memory as a file: QEMU's migration stream, plain or in zstd; a reader tells them apart by the first
 * bytes. zstd halves the file and doubles the time that it takes, both ways, so plain is the default. A file is
 * whole or not there: it is written beside its name and renamed when it is on the disk.
 */
import { createReadStream, createWriteStream } from 'node:fs';
import { open, rename, rm, stat } from 'node:fs/promises';
import { createConnection, createServer, type Server, type Socket } from 'node:net';
import type { Writable } from 'node:stream';
import { finished, pipeline } from 'node:stream/promises';
import { constants, createZstdCompress, createZstdDecompress } from 'node:zlib';
import { AppError, asAppError } from '../model/errors.ts';
import { KiB } from '../model/units.ts';
import { withDeadline } from '../qmp/index.ts';
import type { Machine } from './machine.ts';
import { type Captured, type CaptureOptions, captureMemory, listenForMemory } from './memory.ts';

const chunkBytes = 512 * KiB;
const zstdMagic = Buffer.from([0x28, 0xb5, 0x2f, 0xfd]);
const zstdParameters = { [constants.ZSTD_c_compressionLevel]: 1, [constants.ZSTD_c_checksumFlag]: 1 };
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
  const cannotWrite = new AbortController();
  const writing = connection.then(async (socket) => {
    try {
      await writeFile(socket, partial, compress, (error) => cannotWrite.abort(explain(file, error)));
    } finally {
      socket.destroy();
    }
  });
  writing.catch(() => {});
  const either = AbortSignal.any(signal ? [signal, cannotWrite.signal] : [cannotWrite.signal]);
  const captured = await captureMemory(machine, { ...options, socketPath, signal: either });
  await withDeadline(writing, { signal: either, onTimeout: () => new Error('unreachable') });
  await rename(partial, file);
  return { ...captured, fileBytes: (await stat(file)).size };
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

function explain(file: string, error: Error): AppError {
  const isFull = (error as NodeJS.ErrnoException).code === 'ENOSPC';
  if (!isFull) return asAppError(error);
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

/**
 * Writes all that comes. When that fails it says so at once and goes on to read: QEMU must get rid of its pages until
 * the capture has been ended in order.
 */
async function writeFile(
  socket: Socket,
  path: string,
  compress: boolean,
  onFailure: (error: Error) => void,
): Promise<void> {
  const target = createWriteStream(path, { mode: 0o600, flush: true, highWaterMark: 4 * chunkBytes });
  const zstd = compress ? createZstdCompress({ chunkSize: chunkBytes, params: zstdParameters }) : undefined;
  const input: Writable = zstd ?? target;
  let failure: Error | undefined;
  const written = (zstd ? pipeline(zstd, target) : finished(target)).catch((error) => {
    failure = error;
    onFailure(error);
  });
  for await (const chunk of socket) {
    if (failure || input.write(chunk)) continue;
    const drained = Promise.withResolvers<void>();
    input.once('drain', drained.resolve);
    await Promise.race([drained.promise, written]);
    input.off('drain', drained.resolve);
  }
  input.end();
  await written;
  if (failure) throw failure;
}
