/**
 * An NBD server over a unix socket for one export. What the client asks is done by a backend; this file bounds how
 * much of it is under way at a time: beyond that the socket is not read, and the client waits.
 */
import { once } from 'node:events';
import { rm } from 'node:fs/promises';
import { createServer, type Server, type Socket } from 'node:net';
import { AppError } from '../model/errors.ts';
import { MiB } from '../model/units.ts';
import {
  commandFlag,
  type ExportInfo,
  type Extent,
  maxExtents,
  maxPayloadBytes,
  NbdError,
  type NbdErrorName,
  nbdErrors,
  transmissionFlag,
} from './protocol.ts';
import { type NbdRequest, NbdServerCodec } from './server-codec.ts';

/**
 * Where the bytes of an export are. Ranges are inside it when they come here. Throws `NbdError` for what the client is
 * to hear; anything else is EIO to it.
 */
export interface Backend {
  readonly sizeBytes: number;
  /** Nothing that changes the export may then be missing below, but is never called. */
  readonly isReadOnly?: boolean;
  read(offset: number, lengthBytes: number): Promise<Buffer>;
  /** `fua`: on the disk before it resolves. */
  write(offset: number, bytes: Buffer, options: { fua: boolean }): Promise<void>;
  /**
   * `mayUnmap`: a hole will do. `fast`: fail with ENOTSUP rather than write zeroes one by one.
   */
  writeZeroes(
    offset: number,
    lengthBytes: number,
    options: { fua: boolean; mayUnmap: boolean; fast: boolean },
  ): Promise<void>;
  trim(offset: number, lengthBytes: number, options: { fua: boolean }): Promise<void>;
  /** All writes that were answered are on the disk. */
  flush(): Promise<void>;
  /** What is hole or zero from `offset` on; absent: everything is data. */
  extents?(offset: number, lengthBytes: number): Promise<Extent[]>;
}

export interface ServeOptions {
  path: string;
  exportName: string;
  backend: Backend;
  /** Clients at one time; QEMU brings one. */
  maxConnections?: number;
  /** A client has gone, in order or with the error. */
  onDisconnect?: (error: Error | undefined) => void;
}

export interface NbdServer extends AsyncDisposable {
  readonly connections: number;
}

const maxRequests = 64;
const maxBytesUnderWay = 64 * MiB;

/** Listens when it resolves. Disposing closes all connections and removes the socket. */
export async function serveNbd(options: ServeOptions): Promise<NbdServer> {
  const { path, exportName, backend, maxConnections = 1, onDisconnect = () => {} } = options;
  await rm(path, { force: true });
  const connections = new Set<Connection>();
  const server: Server = createServer((socket) => {
    if (connections.size >= maxConnections) return socket.destroy();
    const connection = new Connection(socket, exportName, backend, (error) => {
      connections.delete(connection);
      onDisconnect(error);
    });
    connections.add(connection);
  });
  server.listen(path);
  await once(server, 'listening');
  return {
    get connections() {
      return connections.size;
    },
    async [Symbol.asyncDispose]() {
      const closed = new Promise((resolve) => server.close(resolve));
      for (const connection of connections) connection.destroy();
      await closed;
      await rm(path, { force: true });
    },
  };
}

/** Serves one client on a socket that is open already. Resolves when it has taken its leave, rejects when it broke. */
export function serveNbdOn(socket: Socket, options: { exportName: string; backend: Backend }): Promise<void> {
  const { promise, resolve, reject } = Promise.withResolvers<void>();
  new Connection(socket, options.exportName, options.backend, (error) => (error ? reject(error) : resolve()));
  socket.resume();
  return promise;
}

export function exportInfo({ sizeBytes, isReadOnly, extents: _ }: Backend): ExportInfo {
  const writable =
    transmissionFlag.sendTrim | transmissionFlag.sendWriteZeroes | transmissionFlag.sendFastZero;
  const flags =
    transmissionFlag.hasFlags |
    transmissionFlag.sendFlush |
    transmissionFlag.sendFua |
    (isReadOnly ? transmissionFlag.readOnly : writable);
  return { sizeBytes, flags, minBlockBytes: 1, preferredBlockBytes: 65_536, maxPayloadBytes };
}

class Connection {
  readonly #socket: Socket;
  readonly #backend: Backend;
  readonly #codec: NbdServerCodec;
  #requests = 0;
  #bytes = 0;
  #isEnding = false;
  #failure: Error | undefined;

  constructor(socket: Socket, name: string, backend: Backend, onClose: (error: Error | undefined) => void) {
    this.#socket = socket;
    this.#backend = backend;
    this.#codec = new NbdServerCodec(
      { name, info: exportInfo(backend) },
      {
        send: (bytes) => void socket.write(bytes),
        request: (request) => void this.#serve(request),
        end: () => {
          this.#isEnding = true;
          this.#endWhenDone();
        },
      },
    );
    socket.on('data', (bytes: Buffer) => {
      try {
        this.#codec.push(bytes);
      } catch (error) {
        this.destroy(error as Error);
      }
      this.#pace();
    });
    socket.on('drain', () => this.#pace());
    socket.on('error', (error) => {
      this.#failure ??= error;
    });
    // A client that hangs up without taking leave; a socket that allows half-open ones would stay.
    socket.on('end', () => socket.end());
    socket.on('close', () => onClose(this.#failure));
  }

  destroy(error?: Error): void {
    this.#failure ??= error;
    this.#socket.destroy();
  }

  async #serve(request: NbdRequest): Promise<void> {
    const costBytes = request.command === 'read' ? request.lengthBytes : (request.payload?.length ?? 0);
    this.#requests += 1;
    this.#bytes += costBytes;
    let answer: Buffer[];
    try {
      answer = await this.#perform(request);
    } catch (error) {
      const name: NbdErrorName = error instanceof NbdError ? error.nbdCode : codeOf(error);
      answer = [this.#codec.error(request, name, error instanceof Error ? error.message : 'failed')];
    }
    this.#requests -= 1;
    this.#bytes -= costBytes;
    if (this.#socket.writable) for (const bytes of answer) this.#socket.write(bytes);
    this.#pace();
    this.#endWhenDone();
  }

  async #perform(request: NbdRequest): Promise<Buffer[]> {
    const { command, offset, lengthBytes, payload } = request;
    const { sizeBytes, isReadOnly } = this.#backend;
    const fua = (request.flags & commandFlag.fua) !== 0;
    const ok = () => [this.#codec.ok(request)];
    if (command === 'flush') {
      await this.#backend.flush();
      return ok();
    }
    const end = offset + (payload?.length ?? lengthBytes);
    if (end > sizeBytes)
      throw new NbdError(
        command === 'write' ? 'ENOSPC' : 'EINVAL',
        `${command} ends at ${end} of ${sizeBytes}`,
      );
    if (isReadOnly && (command === 'write' || command === 'trim' || command === 'writeZeroes'))
      throw new NbdError('EPERM', 'the export is read-only');
    switch (command) {
      case 'read':
        return this.#codec.data(request, await this.#backend.read(offset, lengthBytes));
      case 'write':
        await this.#backend.write(offset, payload!, { fua });
        return ok();
      case 'trim':
        await this.#backend.trim(offset, lengthBytes, { fua });
        return ok();
      case 'writeZeroes': {
        const mayUnmap = (request.flags & commandFlag.noHole) === 0;
        const fast = (request.flags & commandFlag.fastZero) !== 0;
        await this.#backend.writeZeroes(offset, lengthBytes, { fua, mayUnmap, fast });
        return ok();
      }
      case 'blockStatus': {
        if (lengthBytes === 0) throw new NbdError('EINVAL', 'block status of 0 bytes');
        const extents = (await this.#backend.extents?.(offset, lengthBytes)) ?? [{ lengthBytes, flags: 0 }];
        return [this.#codec.status(request, extents.slice(0, maxExtents))];
      }
      default:
        throw new NbdError('EINVAL', `${command} is not supported`);
    }
  }

  /** Reads on only while there is room for what may come. */
  #pace(): void {
    const isBusy =
      this.#requests >= maxRequests || this.#bytes >= maxBytesUnderWay || this.#socket.writableNeedDrain;
    if (isBusy && !this.#socket.isPaused()) this.#socket.pause();
    else if (!isBusy && this.#socket.isPaused()) this.#socket.resume();
  }

  #endWhenDone(): void {
    if (this.#isEnding && this.#requests === 0) this.#socket.end();
  }
}

function codeOf(error: unknown): NbdErrorName {
  if (error instanceof AppError && error.code === 'insufficient_space') return 'ENOSPC';
  const code = (error as NodeJS.ErrnoException).code;
  return code !== undefined && code in nbdErrors ? (code as NbdErrorName) : 'EIO';
}
