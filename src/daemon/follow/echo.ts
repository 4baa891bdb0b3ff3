/** The UDP socket of a cloudlet: answers the probes of peers, and sends its own. See `echo-packet.ts`. */
import { randomBytes } from 'node:crypto';
import { createSocket, type RemoteInfo, type Socket } from 'node:dgram';
import { once } from 'node:events';
import { isIPv6 } from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import type { Uuid } from '../../model/ids.ts';
import { decodePacket, encodePacket, keyFor } from './echo-packet.ts';

export interface EchoOptions {
  ownId: Uuid;
  /** Peers get answers, others do not. */
  isPeer: (id: Uuid) => boolean;
}

export interface ProbeTarget {
  /** An IP address. */
  address: string;
  port: number;
  key: Buffer;
}

interface Waiting {
  key: Buffer;
  address: string;
  sentAtMs: number;
  end: (outcome: number | 'lost') => void;
}

/** The most that are under way at one time. */
const maxWaiting = 4096;

export class Echo implements AsyncDisposable {
  readonly #options: EchoOptions;
  readonly #secret = randomBytes(32);
  readonly #waiting = new Map<string, Waiting>();
  #socket: Socket | undefined;

  constructor(options: EchoOptions) {
    this.#options = options;
  }

  /** Where it listens; undefined before `listen`. */
  get port(): number | undefined {
    return this.#socket?.address().port;
  }

  /** The key for a peer that wants to measure the way to here. */
  keyFor(peerId: Uuid): Buffer {
    return keyFor(this.#secret, peerId);
  }

  /** Binds to the port, or to any free one if it is taken. */
  async listen({ host, port }: { host: string; port: number }): Promise<void> {
    try {
      this.#socket = await bind(host, port);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'EADDRINUSE') throw error;
      this.#socket = await bind(host, 0);
    }
    this.#socket.unref();
    this.#socket.on('message', (bytes, from) => this.#receive(bytes, from));
    // What could not be sent counts as lost.
    this.#socket.on('error', () => {});
  }

  /** Sends so many probes, one after the other, and gives each round trip in ms, or that it was lost. */
  async probe(
    target: ProbeTarget,
    { count, gapMs, timeoutMs }: { count: number; gapMs: number; timeoutMs: number },
  ): Promise<(number | 'lost')[]> {
    const sent: Promise<number | 'lost'>[] = [];
    for (let i = 0; i < count; i += 1) {
      if (i > 0) await sleep(gapMs, undefined, { ref: false });
      sent.push(this.#probeOnce(target, timeoutMs));
    }
    return Promise.all(sent);
  }

  #probeOnce({ address, port, key }: ProbeTarget, timeoutMs: number): Promise<number | 'lost'> {
    const socket = this.#socket;
    if (!socket || this.#waiting.size >= maxWaiting) return Promise.resolve('lost');
    const nonce = randomBytes(16).toString('hex');
    const packet = encodePacket({ kind: 'question', askerId: this.#options.ownId, nonce }, key);
    return new Promise((resolve) => {
      const end = (outcome: number | 'lost') => {
        clearTimeout(timer);
        this.#waiting.delete(nonce);
        resolve(outcome);
      };
      const timer = setTimeout(() => end('lost'), timeoutMs);
      timer.unref();
      this.#waiting.set(nonce, { key, address, sentAtMs: performance.now(), end });
      socket.send(packet, port, address, (error) => {
        if (error) end('lost');
      });
    });
  }

  #receive(bytes: Buffer, from: RemoteInfo): void {
    const now = performance.now();
    // An answer names the asker, ourselves; its key is that of the probe with this nonce.
    const nonce = bytes.length > 37 ? bytes.toString('hex', 21, 37) : '';
    const packet = decodePacket(bytes, (askerId, kind) => {
      if (kind === 'answer')
        return askerId === this.#options.ownId ? this.#waiting.get(nonce)?.key : undefined;
      return this.#options.isPeer(askerId) ? this.keyFor(askerId) : undefined;
    });
    if (!packet) return;
    if (packet.kind === 'question') {
      const answer = encodePacket({ ...packet, kind: 'answer' }, this.keyFor(packet.askerId));
      this.#socket?.send(answer, from.port, from.address);
      return;
    }
    const waiting = this.#waiting.get(packet.nonce);
    waiting?.end(now - waiting.sentAtMs);
  }

  async close(): Promise<void> {
    const socket = this.#socket;
    this.#socket = undefined;
    for (const waiting of this.#waiting.values()) waiting.end('lost');
    if (!socket) return;
    socket.close();
    await once(socket, 'close');
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }
}

async function bind(host: string, port: number): Promise<Socket> {
  const socket = createSocket(isIPv6(host) ? 'udp6' : 'udp4');
  try {
    socket.bind(port, host);
    await once(socket, 'listening');
    return socket;
  } catch (error) {
    socket.close();
    throw error;
  }
}
