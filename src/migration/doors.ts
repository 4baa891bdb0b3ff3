/**
 * Unix sockets through which QEMU reaches the link, and the link QEMU. QEMU sees only these; where the bytes go, and
 * that the link is cut and mended in between, it never notices.
 */
import { rm } from 'node:fs/promises';
import { createConnection, createServer, type Server, type Socket } from 'node:net';
import type { Duplex } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import type { Session } from '../link/index.ts';
import { AppError } from '../model/errors.ts';

export interface Door extends AsyncDisposable {
  path: string;
  /** Rejects when a stream through the door broke; never resolves. */
  broken: Promise<never>;
  readonly isBroken: boolean;
  /** Bytes that QEMU has sent through it. */
  readonly sentBytes: number;
}

/** Listens for QEMU at `path`; each of its connections, still paused, is for `serve`, which resolves at its end. */
export async function openDoor(path: string, serve: (socket: Socket) => Promise<void>): Promise<Door> {
  const sockets = new Set<Socket>();
  const broken = Promise.withResolvers<never>();
  let isBroken = false;
  broken.promise.catch(() => {
    isBroken = true;
  });
  let pastBytes = 0;
  const server = createServer({ allowHalfOpen: true, pauseOnConnect: true }, (socket) => {
    sockets.add(socket);
    socket.once('close', () => {
      sockets.delete(socket);
      pastBytes += socket.bytesRead;
    });
    // Until the stream is there.
    socket.on('error', () => {});
    serve(socket).catch((error) => {
      socket.destroy();
      broken.reject(error);
    });
  });
  await rm(path, { force: true });
  await listen(server, path);
  return {
    path,
    broken: broken.promise,
    get isBroken() {
      return isBroken;
    },
    get sentBytes() {
      let bytes = pastBytes;
      for (const socket of sockets) bytes += socket.bytesRead;
      return bytes;
    },
    async [Symbol.asyncDispose]() {
      const closed = new Promise<void>((resolve) => server.close(() => resolve()));
      for (const socket of sockets) socket.destroy();
      await closed;
      await rm(path, { force: true });
    },
  };
}

/** Joins a stream with a socket on which QEMU listens; resolves when both directions have ended. */
export async function joinWithQemu(path: string, stream: Duplex): Promise<void> {
  const socket = createConnection({ path, allowHalfOpen: true });
  await joinStreams(stream, socket);
}

/** Bytes both ways, each end of data passed on; an error of one ends both. */
export async function joinStreams(stream: Duplex, socket: Socket): Promise<void> {
  try {
    if (isSession(stream)) await stream.carry(socket);
    else
      await Promise.all([pipeline(stream, socket, { end: true }), pipeline(socket, stream, { end: true })]);
  } catch (error) {
    stream.destroy();
    socket.destroy();
    throw new AppError(
      'peer_unreachable',
      `The stream between QEMU and the link broke: ${(error as Error).message}`,
      {},
      { cause: error },
    );
  }
}

const isSession = (stream: Duplex): stream is Session => 'carry' in stream;

async function listen(server: Server, path: string): Promise<void> {
  const { promise, resolve, reject } = Promise.withResolvers<void>();
  server.once('error', reject);
  server.listen(path, resolve);
  await promise;
}
