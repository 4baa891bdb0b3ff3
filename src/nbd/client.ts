/** An NBD client over a unix socket: commands as calls, several under way at a time, bounded. */
import { createConnection, type Socket } from 'node:net';
import { AppError } from '../model/errors.ts';
import { type Answer, type Command, NbdClientCodec } from './client-codec.ts';
import { type ExportInfo, type Extent, NbdError, transmissionFlag } from './protocol.ts';

export interface ConnectOptions {
  path: string;
  exportName: string;
  signal?: AbortSignal;
  /** To connect and to negotiate. */
  timeoutMs?: number;
}

const maxUnderWay = 16;
const defaultTimeoutMs = 10_000;

/**
 * Connects and negotiates. Throws `peer_unreachable` when nobody listens, `qemu_failed` when the server refuses the
 * export or speaks something else, `timeout`, `cancelled`.
 */
export async function connectNbd(options: ConnectOptions): Promise<NbdClient> {
  const { path, exportName, signal, timeoutMs = defaultTimeoutMs } = options;
  const socket = createConnection({ path });
  const ready = Promise.withResolvers<NbdClient>();
  const timer = setTimeout(
    () =>
      socket.destroy(new AppError('timeout', `Connect to NBD server ${path}: no export in ${timeoutMs} ms`)),
    timeoutMs,
  );
  const onAbort = () => socket.destroy(new AppError('cancelled', `Connect to NBD server ${path}: cancelled`));
  signal?.addEventListener('abort', onAbort, { once: true });
  if (signal?.aborted) onAbort();
  new NbdClient(socket, exportName, ready.resolve, ready.reject);
  try {
    return await ready.promise;
  } finally {
    clearTimeout(timer);
    signal?.removeEventListener('abort', onAbort);
  }
}

export class NbdClient implements AsyncDisposable {
  readonly #socket: Socket;
  readonly #codec: NbdClientCodec;
  readonly #calls = new Map<bigint, (answer: Answer | Error) => void>();
  readonly #queue: (() => void)[] = [];
  #info: (ExportInfo & { hasAllocation: boolean }) | undefined;
  #failure: Error | undefined;

  /** Use `connectNbd`. */
  constructor(
    socket: Socket,
    exportName: string,
    onReady: (client: NbdClient) => void,
    onFailure: (error: Error) => void,
  ) {
    this.#socket = socket;
    this.#codec = new NbdClientCodec(exportName, {
      send: (bytes) => void socket.write(bytes),
      ready: (info) => {
        this.#info = info;
        onReady(this);
      },
      answer: (answer) => this.#settle(answer.cookie, answer),
    });
    socket.on('data', (bytes: Buffer) => {
      try {
        this.#codec.push(bytes);
      } catch (error) {
        socket.destroy(error as Error);
      }
    });
    socket.on('error', (error) => {
      this.#failure ??= explain(error);
    });
    socket.on('close', () => {
      this.#failure ??= new AppError('peer_unreachable', 'The NBD server has closed the connection');
      onFailure(this.#failure);
      for (const call of this.#calls.values()) call(this.#failure);
      this.#calls.clear();
      for (const next of this.#queue.splice(0)) next();
    });
  }

  get info(): ExportInfo & { hasAllocation: boolean } {
    return this.#info!;
  }

  get sizeBytes(): number {
    return this.info.sizeBytes;
  }

  /** All calls throw `NbdError` for what the server refuses, `peer_unreachable` when the connection is lost. */
  async read(offset: number, lengthBytes: number): Promise<Buffer> {
    return (await this.#call({ command: 'read', offset, lengthBytes })).data!;
  }

  async write(offset: number, payload: Buffer): Promise<void> {
    await this.#call({ command: 'write', offset, payload });
  }

  /** Where the server cannot, zeroes are written. */
  async writeZeroes(offset: number, lengthBytes: number): Promise<void> {
    if (this.#has(transmissionFlag.sendWriteZeroes)) {
      await this.#call({ command: 'writeZeroes', offset, lengthBytes });
      return;
    }
    const most = this.info.maxPayloadBytes;
    for (let at = 0; at < lengthBytes; at += most)
      await this.write(offset + at, Buffer.alloc(Math.min(most, lengthBytes - at)));
  }

  /** A wish: where the server cannot, nothing happens. */
  async trim(offset: number, lengthBytes: number): Promise<void> {
    if (this.#has(transmissionFlag.sendTrim)) await this.#call({ command: 'trim', offset, lengthBytes });
  }

  async flush(): Promise<void> {
    if (this.#has(transmissionFlag.sendFlush)) await this.#call({ command: 'flush' });
  }

  /** Extents from `offset` on, which may end before or behind the range; all data where the server does not tell. */
  async extents(offset: number, lengthBytes: number): Promise<Extent[]> {
    if (!this.info.hasAllocation) return [{ lengthBytes, flags: 0 }];
    return (await this.#call({ command: 'blockStatus', offset, lengthBytes })).extents!;
  }

  /** Takes leave and waits until the server has closed. */
  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#socket.closed) return;
    const closed = new Promise((resolve) => this.#socket.once('close', resolve));
    const { bytes } = this.#codec.encode({ command: 'disconnect' });
    if (this.#socket.writable) this.#socket.end(Buffer.concat(bytes));
    else this.#socket.destroy();
    await closed;
  }

  #has(flag: number): boolean {
    return (this.info.flags & flag) !== 0;
  }

  async #call(command: Command): Promise<Answer & { error?: undefined }> {
    while (this.#calls.size >= maxUnderWay && !this.#failure)
      await new Promise<void>((resolve) => this.#queue.push(resolve));
    if (this.#failure) throw this.#failure;
    const { cookie, bytes } = this.#codec.encode(command);
    const { promise, resolve, reject } = Promise.withResolvers<Answer & { error?: undefined }>();
    this.#calls.set(cookie, (answer) => {
      if (answer instanceof Error) reject(answer);
      else if (answer.error) reject(answer.error);
      else resolve(answer);
    });
    for (const piece of bytes) this.#socket.write(piece);
    return promise;
  }

  #settle(cookie: bigint, answer: Answer): void {
    const call = this.#calls.get(cookie);
    this.#calls.delete(cookie);
    call?.(answer);
    this.#queue.shift()?.();
  }
}

function explain(error: Error): Error {
  if (error instanceof AppError || error instanceof NbdError) return error;
  return new AppError(
    'peer_unreachable',
    `The connection to the NBD server is lost: ${error.message}`,
    {},
    { cause: error },
  );
}
