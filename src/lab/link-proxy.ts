/**
 * Stands between a cloudlet and all who reach it by its URL, as the network between two sites does: it can go
 * silent, which is what a cut looks like from the ends (no byte, no end, no refusal), and come back.
 */
import { once } from 'node:events';
import { connect, createServer, type Server, type Socket } from 'node:net';

export class LinkProxy implements AsyncDisposable {
  readonly port: number;
  readonly #server: Server;
  readonly #sockets = new Set<Socket>();
  #targetPort = 0;
  #isCut = false;

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
    for (const [from, to] of [
      [near, far],
      [far, near],
    ] as const) {
      this.#sockets.add(from);
      from.on('data', (bytes) => {
        if (to.write(bytes)) return;
        from.pause();
        to.once('drain', () => {
          if (!this.#isCut) from.resume();
        });
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
