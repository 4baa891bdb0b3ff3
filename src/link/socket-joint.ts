/**
 * A session and a socket joined: what the socket reads lies at once where it stays until the peer has it, and what has
 * arrived is written from where it lies. Bytes pass neither through a stream nor through a buffer of their own.
 *
 * Bytes that arrived in one turn of the event loop go to the socket together: QEMU then wakes up once for many records.
 */
import type { Socket } from 'node:net';
import { readInto } from './read-into.ts';

/** The session's side. */
export interface JointSession {
  room(): Uint8Array;
  /** Bytes are in `room`; whether there is more, and who hears of it when there is. */
  fill(lengthBytes: number, onRoom: () => void): boolean;
  /** The socket has ended. */
  end(): void;
  first(): Uint8Array | undefined;
  drop(lengthBytes: number): void;
  /** The peer has ended, and every byte was dropped. */
  hasEnded(): boolean;
  /** The socket knows that. */
  endTaken(): void;
}

export class SocketJoint {
  readonly #socket: Socket;
  readonly #session: JointSession;
  #isDue = false;
  #isWriting = false;

  constructor(socket: Socket, session: JointSession) {
    this.#socket = socket;
    this.#session = session;
    const resume = () => socket.resume();
    readInto(
      socket,
      () => session.room(),
      ({ length }) => session.fill(length, resume),
    );
    socket.once('end', () => session.end());
  }

  /** There may be bytes for the socket, or their end. */
  arrived(): void {
    if (this.#isDue || this.#isWriting) return;
    this.#isDue = true;
    setImmediate(() => {
      this.#isDue = false;
      this.#write();
    });
  }

  #write(): void {
    if (this.#isWriting || this.#socket.destroyed) return;
    const bytes = this.#session.first();
    if (bytes === undefined) {
      if (!this.#session.hasEnded() || this.#socket.writableEnded) return;
      this.#socket.end();
      this.#session.endTaken();
      return;
    }
    this.#isWriting = true;
    this.#socket.write(bytes, (error) => {
      this.#isWriting = false;
      if (error) return;
      this.#session.drop(bytes.length);
      this.#write();
    });
  }
}
