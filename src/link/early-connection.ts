/**
 * A connection that is made before it is known for which session: TCP and TLS take two round trips, which pass while
 * both sides still agree on what the session is for. The server waits `helloTimeoutMs` for what comes next, so it
 * is used soon or not at all.
 */
import type { TLSSocket } from 'node:tls';
import { connectSocket, type Target } from './connect.ts';
import type { LinkLimits } from './limits.ts';

/** Of the time that the server waits. */
const usableShare = 0.6;

export class EarlyConnection implements Disposable {
  readonly purpose: string;
  readonly #abort = new AbortController();
  #connecting: Promise<TLSSocket | undefined> | undefined;

  /** Begins to connect. Failures are for the connection that is made in its place. */
  constructor(target: Target, limits: LinkLimits) {
    this.purpose = target.purpose;
    const signal = AbortSignal.any([this.#abort.signal, AbortSignal.timeout(limits.connectTimeoutMs)]);
    this.#connecting = connectSocket(target, signal).then(
      (socket) => {
        setTimeout(() => this[Symbol.dispose](), limits.helloTimeoutMs * usableShare).unref();
        return socket;
      },
      () => undefined,
    );
  }

  /** The connection, once; `undefined` when there is none or it has waited for too long. */
  async take(): Promise<TLSSocket | undefined> {
    const connecting = this.#connecting;
    this.#connecting = undefined;
    const socket = await connecting;
    return socket?.destroyed || socket?.readableEnded ? undefined : socket;
  }

  /** Gives it up if nobody has taken it. */
  [Symbol.dispose](): void {
    const connecting = this.#connecting;
    if (!connecting) return;
    this.#connecting = undefined;
    this.#abort.abort();
    connecting.then((socket) => socket?.destroy());
  }
}
