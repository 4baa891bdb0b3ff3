/**
 * The serial console of one VM: one connection to QEMU, shared by any number of readers and writers. QEMU also
 * writes everything to console.log, attached or not.
 *
 * The connection is always drained: a reader that is slow loses its oldest bytes and is told how many, because a
 * full socket would hold up the guest's serial port.
 */
import { createConnection, type Socket } from 'node:net';
import { AppError } from '../model/errors.ts';
import { KiB } from '../model/units.ts';

const maxQueuedBytes = 256 * KiB;
const maxTypedBytes = 256 * KiB;
const maxAttached = 32;

export class Console {
  readonly #path: string;
  readonly #attached = new Set<ConsoleSession>();
  #socket: Socket | undefined;

  constructor(socketPath: string) {
    this.#path = socketPath;
  }

  /** Output from now on, and a way to type. The caller closes the session. */
  attach(): ConsoleSession {
    this.requireRoom();
    const socket = this.#connect();
    const session = new ConsoleSession(
      (bytes) => type(socket, bytes),
      () => this.#detach(session),
    );
    this.#attached.add(session);
    return session;
  }

  /** Throws `too_many` while no further session could be opened. */
  requireRoom(): void {
    if (this.#attached.size < maxAttached) return;
    throw new AppError('too_many', `${maxAttached} consoles of this VM are open already`, { maxAttached });
  }

  /** Ends every session. */
  close(): void {
    this.#disconnect(this.#socket);
  }

  #connect(): Socket {
    if (this.#socket) return this.#socket;
    const socket = createConnection({ path: this.#path });
    this.#socket = socket;
    socket.on('data', (bytes: Buffer) => {
      for (const session of this.#attached) session.push(bytes);
    });
    socket.on('error', () => this.#disconnect(socket));
    socket.on('close', () => this.#disconnect(socket));
    return socket;
  }

  #detach(session: ConsoleSession): void {
    this.#attached.delete(session);
    if (this.#attached.size === 0) this.#disconnect(this.#socket);
  }

  #disconnect(socket: Socket | undefined): void {
    if (!socket || this.#socket !== socket) return;
    this.#socket = undefined;
    socket.destroy();
    for (const session of [...this.#attached]) session.close();
  }
}

/** A serial port takes what is typed byte by byte, and a guest may never take it. */
function type(socket: Socket, bytes: Uint8Array): void {
  if (socket.writableLength + bytes.length > maxTypedBytes) {
    throw new AppError('too_many', `More than ${maxTypedBytes} typed bytes wait for the guest`, {
      maxTypedBytes,
    });
  }
  socket.write(bytes);
}

/** One reader's and writer's end. The loop ends when the session or the console is closed. */
export class ConsoleSession implements AsyncIterable<Buffer> {
  readonly #write: (bytes: Uint8Array) => void;
  readonly #onClose: () => void;
  #queue: Buffer[] = [];
  #queuedBytes = 0;
  #lostBytes = 0;
  #wake = Promise.withResolvers<void>();
  #closed = false;

  constructor(write: (bytes: Uint8Array) => void, onClose: () => void) {
    this.#write = write;
    this.#onClose = onClose;
  }

  write(bytes: Uint8Array | string): void {
    if (this.#closed)
      throw new AppError('wrong_state', 'The console is closed', { state: 'closed', allowed: [] });
    this.#write(Buffer.from(bytes));
  }

  /** For the console: output of the guest. */
  push(bytes: Buffer): void {
    if (this.#closed) return;
    this.#queue.push(bytes);
    this.#queuedBytes += bytes.length;
    while (this.#queuedBytes > maxQueuedBytes) {
      const oldest = this.#queue.shift()!;
      this.#queuedBytes -= oldest.length;
      this.#lostBytes += oldest.length;
    }
    this.#wake.resolve();
  }

  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    this.#wake.resolve();
    this.#onClose();
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<Buffer, void, undefined> {
    try {
      for (;;) {
        await this.#wake.promise;
        this.#wake = Promise.withResolvers();
        const queue = this.#queue;
        const lostBytes = this.#lostBytes;
        this.#queue = [];
        this.#queuedBytes = 0;
        this.#lostBytes = 0;
        if (lostBytes > 0) yield Buffer.from(`\r\n[${lostBytes} bytes of output were lost here]\r\n`);
        yield* queue;
        if (this.#closed && this.#queue.length === 0) return;
        if (this.#queue.length > 0 || this.#closed) this.#wake.resolve();
      }
    } finally {
      this.close();
    }
  }
}
