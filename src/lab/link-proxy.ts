/**
 * Stands between a cloudlet and all who reach it by its URL, as the network between two sites does: it can go
 * silent, which is what a cut looks like from the ends (no byte, no end, no refusal), and come back. It can be slow, too.
 */
import { once } from 'node:events';
import { connect, createServer, type Server, type Socket } from 'node:net';

export class LinkProxy implements AsyncDisposable {
  readonly port: number;
  readonly #server: Server;
  readonly #sockets = new Set<Socket>();
  #targetPort = 0;
  #isCut = false;
  readonly #pace = { in: new Pace(), out: new Pace() };

  private constructor(server: Server) {
    this.#server = server;
    this.port = (server.address() as { port: number }).port;
    server.on('connection', (near) => this.#join(near));
  }

  static async listen(): Promise<LinkProxy> {
    const server = createServer({ pauseOnConnect: true }).listen(0, '127.0.0.1');
    await once(server, 'listening');
    return new LinkProxy(server);
  }

  /** Where the cloudlet really listens. */
  leadTo(port: number): void {
    this.#targetPort = port;
  }

  /** How many bytes per second get through in all, towards the cloudlet and from it; as fast as it goes if absent. */
  limit({
    inBytesPerSecond,
    outBytesPerSecond,
  }: {
    inBytesPerSecond?: number;
    outBytesPerSecond?: number;
  }): void {
    this.#pace.in.bytesPerSecond = inBytesPerSecond;
    this.#pace.out.bytesPerSecond = outBytesPerSecond;
  }

  get isCut(): boolean {
    return this.#isCut;
  }

  /** Nothing gets through any more; the ends are told nothing. */
  cut(): void {
    this.#isCut = true;
    for (const socket of this.#sockets) socket.pause();
  }

  /**
   * The network is back. What stood still goes on, or, as after a cut that outlasted TCP, is over: `forget` ends the
   * old connections.
   */
  restore({ forget = false } = {}): void {
    this.#isCut = false;
    for (const socket of this.#sockets) {
      if (forget) socket.destroy();
      else socket.resume();
    }
  }

  #join(near: Socket): void {
    const far = connect(this.#targetPort, '127.0.0.1');
    for (const [from, to, pace] of [
      [near, far, this.#pace.in],
      [far, near, this.#pace.out],
    ] as const) {
      this.#sockets.add(from);
      const goOn = () => {
        if (!this.#isCut) from.resume();
      };
      from.on('data', (bytes) => {
        const waitMs = pace.take(bytes.length);
        const isFull = !to.write(bytes);
        if (!isFull && waitMs === 0) return;
        from.pause();
        if (isFull) to.once('drain', () => setTimeout(goOn, waitMs));
        else setTimeout(goOn, waitMs);
      });
      from.on('end', () => to.end());
      from.on('error', () => {});
      from.on('close', () => {
        this.#sockets.delete(from);
        to.destroy();
      });
      if (this.#isCut) from.pause();
      else from.resume();
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    const closed = once(this.#server, 'close');
    this.#server.close();
    for (const socket of this.#sockets) socket.destroy();
    await closed;
  }
}

/** Bytes that go one behind the other at a rate, whatever socket they came by. */
class Pace {
  bytesPerSecond: number | undefined;
  #freeAt = 0;

  /** How long after these bytes there may be no others, in ms. */
  take(bytes: number): number {
    if (this.bytesPerSecond === undefined) return 0;
    const now = performance.now();
    this.#freeAt = Math.max(this.#freeAt, now) + (bytes * 1000) / this.bytesPerSecond;
    return Math.ceil(this.#freeAt - now);
  }
}
