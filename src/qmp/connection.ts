/**
 * One connection to one QEMU monitor.
 *
 *   greet -> negotiate -> ready -> closed
 *
 * Commands carry numeric ids and may be in flight together. A line that is not QMP closes the connection with an
 * error; closing, for whatever reason, rejects every waiter and ends every stream of events. A reply whose command
 * has already timed out is ignored and only counted.
 */
import { createConnection } from 'node:net';
import type { Duplex } from 'node:stream';
import { AppError } from '../model/errors.ts';
import { MiB } from '../model/units.ts';
import type { ArgumentsOf, QmpCommand, QmpEvent, QmpEventData, ReturnOf } from './commands.ts';
import { abortError, type WaitOptions, withDeadline } from './deadline.ts';
import { EventQueue } from './events.ts';
import { encodeLine, JsonLineDecoder, type JsonObject } from './lines.ts';
import { parseMessage, type QemuVersion } from './messages.ts';

const maxLineBytes = 16 * MiB;
const maxInFlight = 1024;
const maxQueuedEvents = 4096;
const defaultTimeoutMs = 30_000;
const handshakeTimeoutMs = 10_000;

export type QmpState = 'greet' | 'negotiate' | 'ready' | 'closed';

/** The arguments may be left out where the command has none. */
type ExecuteParameters<C extends QmpCommand> =
  undefined extends ArgumentsOf<C>
    ? [args?: ArgumentsOf<C>, options?: WaitOptions]
    : [args: ArgumentsOf<C>, options?: WaitOptions];

interface Waiter {
  command: string;
  reply: PromiseWithResolvers<unknown>;
}

export class QmpConnection implements AsyncDisposable {
  /** Settles, always without an error, when the connection is closed; the value is why. */
  readonly closed: Promise<AppError>;
  readonly #stream: Duplex;
  readonly #decoder = new JsonLineDecoder(maxLineBytes);
  readonly #waiters = new Map<number, Waiter>();
  readonly #listeners = new Set<(event: QmpEvent) => void>();
  readonly #queues = new Set<EventQueue>();
  readonly #onClose = new Set<(reason: AppError) => void>();
  readonly #greeting = Promise.withResolvers<QemuVersion>();
  readonly #closing = Promise.withResolvers<AppError>();
  #state: QmpState = 'greet';
  #closedBy: AppError | undefined;
  #nextId = 1;
  #ignoredReplies = 0;
  #version: QemuVersion | undefined;

  private constructor(stream: Duplex) {
    this.#stream = stream;
    this.closed = this.#closing.promise;
    this.#greeting.promise.catch(() => {});
    stream.on('data', (bytes: Buffer) => this.#receive(bytes));
    stream.on('error', (error) => this.#close(lost('The monitor connection failed', error)));
    stream.on('close', () => this.#close(lost('QEMU closed the monitor connection')));
    stream.on('end', () => this.#close(lost('QEMU closed the monitor connection')));
  }

  /** Connects to a monitor's unix socket and negotiates; ready for commands when it resolves. */
  static async connect(path: string, options: WaitOptions = {}): Promise<QmpConnection> {
    return QmpConnection.over(createConnection({ path }), options);
  }

  /** The same over any stream of bytes. On failure the stream is destroyed. */
  static async over(stream: Duplex, options: WaitOptions = {}): Promise<QmpConnection> {
    const { timeoutMs = handshakeTimeoutMs, signal } = options;
    const connection = new QmpConnection(stream);
    const onTimeout = () =>
      new AppError('timeout', `QEMU's monitor did not greet and negotiate within ${timeoutMs} ms`, {
        waitedFor: 'qmp handshake',
        timeoutMs,
      });
    try {
      await withDeadline(connection.#negotiate(), { timeoutMs, signal, onTimeout });
      return connection;
    } catch (error) {
      connection.close();
      throw error;
    }
  }

  get state(): QmpState {
    return this.#state;
  }

  /** Replies that nobody waited for any more. */
  get ignoredReplies(): number {
    return this.#ignoredReplies;
  }

  get version(): QemuVersion {
    if (!this.#version) throw new Error('Bug: the version of QEMU is not known before its greeting');
    return this.#version;
  }

  /**
   * Runs one command. QEMU's refusal is `qemu_failed` with `command` and `qmpClass`, silence is `timeout`. A
   * command that was given up may still take effect in QEMU.
   */
  async execute<C extends QmpCommand>(command: C, ...rest: ExecuteParameters<C>): Promise<ReturnOf<C>> {
    const [args, { timeoutMs = defaultTimeoutMs, signal } = {}] = rest;
    if (this.#state !== 'ready') throw this.#refusal(command);
    return this.#send(command, args as JsonObject | undefined, { timeoutMs, signal }) as Promise<ReturnOf<C>>;
  }

  /** The same past a main loop that is stuck; QEMU takes only a few commands in this way. */
  async executeOutOfBand<C extends 'migrate-recover' | 'migrate-pause' | 'yank'>(
    command: C,
    args: ArgumentsOf<C>,
    options: WaitOptions = {},
  ): Promise<void> {
    if (this.#state !== 'ready') throw this.#refusal(command);
    const { timeoutMs = defaultTimeoutMs, signal } = options;
    await this.#send(command, args as JsonObject | undefined, { timeoutMs, signal }, 'exec-oob');
  }

  /** Calls the listener for each event from now on; the answer unsubscribes. A listener must not throw. */
  onEvent(listener: (event: QmpEvent) => void): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  /** Events from now on; the loop ends when the connection closes. */
  events(options: { limit?: number } = {}): EventQueue {
    const queue = new EventQueue(options.limit ?? maxQueuedEvents, () => this.#queues.delete(queue));
    if (this.#state === 'closed') queue.end();
    else this.#queues.add(queue);
    return queue;
  }

  /** The first event of this name, from now on, for which `wanted` holds. */
  async waitForEvent<N extends keyof QmpEventData>(
    name: N,
    wanted: (data: QmpEventData[N]) => boolean,
    options: WaitOptions = {},
  ): Promise<QmpEventData[N]> {
    if (this.#closedBy) throw this.#closedBy;
    const found = Promise.withResolvers<QmpEventData[N]>();
    const unsubscribe = this.onEvent((event) => {
      if (event.name !== name) return;
      const data = event.data as QmpEventData[N];
      if (wanted(data)) found.resolve(data);
    });
    this.#onClose.add(found.reject);
    const onTimeout = () =>
      new AppError('timeout', `QEMU sent no fitting ${name} event within ${options.timeoutMs} ms`, {
        waitedFor: name,
        timeoutMs: options.timeoutMs,
      });
    try {
      return await withDeadline(found.promise, { ...options, onTimeout });
    } finally {
      this.#onClose.delete(found.reject);
      unsubscribe();
    }
  }

  /** Closes our end. QEMU goes on without us. */
  close(): void {
    this.#close(lost('The monitor connection was closed by Viper'));
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.close();
  }

  async #negotiate(): Promise<void> {
    this.#version = await this.#greeting.promise;
    // Since QEMU 3.0.
    await this.#send('qmp_capabilities', { enable: ['oob'] }, {});
    if (this.#state === 'negotiate') this.#state = 'ready';
  }

  async #send(
    command: QmpCommand,
    args: JsonObject | undefined,
    options: WaitOptions,
    how: 'execute' | 'exec-oob' = 'execute',
  ): Promise<unknown> {
    const { timeoutMs } = options;
    if (options.signal?.aborted) throw abortError(options.signal);
    if (this.#waiters.size >= maxInFlight) {
      throw new AppError('too_many', `More than ${maxInFlight} QMP commands are in flight`, { command });
    }
    const id = this.#nextId++;
    const reply = Promise.withResolvers<unknown>();
    this.#waiters.set(id, { command, reply });
    this.#stream.write(encodeLine({ [how]: command, ...(args && { arguments: args }), id }));
    const onTimeout = () =>
      new AppError('timeout', `QEMU did not answer ${command} within ${timeoutMs} ms`, {
        waitedFor: command,
        timeoutMs,
      });
    try {
      return await withDeadline(reply.promise, { ...options, onTimeout });
    } finally {
      this.#waiters.delete(id);
    }
  }

  #receive(bytes: Buffer): void {
    if (this.#state === 'closed') return;
    const { messages, refused } = this.#decoder.push(bytes);
    for (const message of messages) {
      // A listener, or the message before, may have closed the connection.
      if (this.state !== 'closed') this.#take(message);
    }
    if (refused) this.#close(malformed(refused));
  }

  #take(message: JsonObject): void {
    const parsed = parseMessage(message);
    if (!parsed) {
      this.#close(malformed('not a greeting, reply or event'));
    } else if (parsed.kind === 'greeting') {
      if (this.#state === 'greet') this.#state = 'negotiate';
      else this.#close(malformed('a second greeting'));
      this.#greeting.resolve(parsed.version);
    } else if (this.#state === 'greet') {
      this.#close(malformed(`a ${parsed.kind} before the greeting`));
    } else if (parsed.kind === 'event') {
      const event = parsed as unknown as QmpEvent;
      for (const queue of this.#queues) queue.push(event);
      for (const listener of [...this.#listeners]) listener(event);
    } else {
      const waiter = typeof parsed.id === 'number' ? this.#waiters.get(parsed.id) : undefined;
      if (!waiter) this.#ignoredReplies += 1;
      else if (parsed.kind === 'return') waiter.reply.resolve(parsed.value);
      else waiter.reply.reject(refusedByQemu(waiter.command, parsed.qmpClass, parsed.description));
    }
  }

  #close(reason: AppError): void {
    if (this.#state === 'closed') return;
    this.#state = 'closed';
    this.#closedBy = reason;
    this.#stream.destroy();
    this.#greeting.reject(reason);
    for (const { command, reply } of this.#waiters.values()) reply.reject(this.#refusal(command));
    this.#waiters.clear();
    for (const reject of this.#onClose) reject(reason);
    this.#onClose.clear();
    for (const queue of this.#queues) queue.end();
    this.#queues.clear();
    this.#listeners.clear();
    this.#closing.resolve(reason);
  }

  #refusal(command: string): AppError {
    const why = this.#closedBy ? this.#closedBy.message : `the monitor is in state ${this.#state}, not ready`;
    return new AppError(
      'qemu_failed',
      `QEMU cannot run ${command}: ${why}`,
      { command },
      { cause: this.#closedBy },
    );
  }
}

const lost = (message: string, cause?: Error): AppError =>
  new AppError(
    'qemu_failed',
    cause ? `${message}: ${cause.message}` : message,
    { reason: 'disconnected' },
    { cause },
  );

const malformed = (what: string): AppError =>
  new AppError('qemu_failed', `QEMU's monitor sent something that is not QMP: ${what}`, {
    reason: 'malformed',
  });

const refusedByQemu = (command: string, qmpClass: string, description: string): AppError =>
  new AppError('qemu_failed', `QEMU refused ${command}: ${description}`, {
    command,
    qmpClass,
    output: description,
  });
