/**
 * One synchronised connection to the QEMU guest agent: one request, one reply.
 *
 * The guest is hostile: it may say anything, at any length, at any time. Whatever is not the one awaited reply
 * closes the connection; the next request makes a new one. Before the first request both ends synchronise: late
 * replies of an earlier connection are thrown away up to the byte 0xFF, which no JSON text contains, and the
 * answer to our own random number. Source: QEMU docs/interop/qemu-ga-ref, guest-sync-delimited.
 */
import { createConnection, type Socket } from 'node:net';
import { AppError } from '../model/errors.ts';
import { MiB } from '../model/units.ts';
import { encodeLine, JsonLineDecoder, type JsonObject } from '../qmp/index.ts';

const maxReplyBytes = 4 * MiB;
const maxSyncReplyBytes = 4096;
const sentinel = 0xff;

export class AgentConnection {
  readonly #socket: Socket;
  readonly #decoder = new JsonLineDecoder(maxReplyBytes);
  readonly #syncId = Math.floor(Math.random() * 2 ** 31);
  readonly #synced = Promise.withResolvers<void>();
  /** Bytes of the sync reply so far, from its sentinel on; undefined when synchronised. */
  #syncing: Buffer | undefined = Buffer.alloc(0);
  #pending: PromiseWithResolvers<JsonObject> | undefined;
  #closedBy: AppError | undefined;

  constructor(path: string) {
    this.#socket = createConnection({ path });
    this.#synced.promise.catch(() => {});
    this.#socket.on('data', (bytes: Buffer) => this.#receive(bytes));
    this.#socket.on('error', (error) =>
      this.close(agentUnavailable(`its channel failed: ${error.message}`, error)),
    );
    this.#socket.on('close', () => this.close(agentUnavailable('QEMU closed its channel')));
    this.#socket.write(Buffer.of(sentinel));
    this.#socket.write(encodeLine({ execute: 'guest-sync-delimited', arguments: { id: this.#syncId } }));
  }

  get isClosed(): boolean {
    return this.#closedBy !== undefined;
  }

  /** Resolves when the agent has answered our number; it waits for the agent to start if it must. */
  synchronised(): Promise<void> {
    return this.#synced.promise;
  }

  /** Sends one request and gives the reply, be it a return or an error of the agent. */
  request(message: JsonObject): Promise<JsonObject> {
    if (this.#closedBy) return Promise.reject(this.#closedBy);
    if (this.#pending || this.#syncing) throw new Error('Bug: the guest agent takes one request at a time');
    this.#pending = Promise.withResolvers();
    this.#socket.write(encodeLine(message));
    return this.#pending.promise;
  }

  close(reason = agentUnavailable('the connection was closed by Viper')): void {
    if (this.#closedBy) return;
    this.#closedBy = reason;
    this.#socket.destroy();
    this.#synced.reject(reason);
    this.#pending?.reject(reason);
    this.#pending = undefined;
  }

  #receive(bytes: Buffer): void {
    if (this.#closedBy) return;
    const rest = this.#syncing ? this.#synchronise(Buffer.concat([this.#syncing, bytes])) : bytes;
    const { messages, refused } = this.#decoder.push(rest);
    for (const message of messages) {
      if (!this.#pending) this.close(agentUnavailable('it spoke without being asked'));
      this.#pending?.resolve(message);
      this.#pending = undefined;
    }
    if (refused) this.close(agentUnavailable(`its reply is garbage (${refused})`));
  }

  /** Looks for our own sync reply and gives what follows it. */
  #synchronise(held: Buffer): Buffer {
    const nothing = Buffer.alloc(0);
    const start = held.lastIndexOf(sentinel);
    // Each reply of a sync begins with the sentinel, so only the last one can be ours.
    const line = start < 0 ? nothing : held.subarray(start);
    const end = line.indexOf('\n');
    if (end < 0) {
      this.#syncing = line.length > maxSyncReplyBytes ? nothing : Buffer.from(line);
      return nothing;
    }
    const [reply] = new JsonLineDecoder(maxSyncReplyBytes).push(line.subarray(1, end + 1)).messages;
    if (reply?.return !== this.#syncId) {
      this.#syncing = nothing;
      return nothing;
    }
    this.#syncing = undefined;
    this.#synced.resolve();
    return line.subarray(end + 1);
  }
}

export const agentUnavailable = (why: string, cause?: unknown): AppError =>
  new AppError('agent_unavailable', `The guest agent does not answer: ${why}`, { reason: why }, { cause });
