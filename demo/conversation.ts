/** The client of the demo's guest: it answers every datagram that the guest sends, and knows the longest silence. */
import { createSocket, type Socket } from 'node:dgram';
import { once } from 'node:events';

export class Conversation implements AsyncDisposable {
  readonly #socket: Socket;
  #last = 0;
  #longestMs = 0;

  private constructor(socket: Socket) {
    this.#socket = socket;
    socket.on('message', (message, from) => {
      const now = performance.now();
      if (this.#last > 0) this.#longestMs = Math.max(this.#longestMs, now - this.#last);
      this.#last = now;
      socket.send(message, from.port, from.address);
    });
  }

  static async listen(): Promise<Conversation> {
    const socket = createSocket('udp4').bind(0, '127.0.0.1');
    await once(socket, 'listening');
    return new Conversation(socket);
  }

  get port(): number {
    return this.#socket.address().port;
  }

  /** Forgets the silences so far. */
  beginGap(): void {
    this.#longestMs = 0;
  }

  /** The longest silence since `beginGap`, in ms. */
  get gapMs(): number {
    return Math.max(this.#longestMs, performance.now() - this.#last);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#socket.close();
    await once(this.#socket, 'close');
  }
}
