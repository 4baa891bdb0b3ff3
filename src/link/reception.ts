/**
 * The server's end of one connection before a session has it: waits for HELLO, and tells a refused client why.
 *
 * Invariant: a reception ends within `helloTimeoutMs` of each thing that it waits for, so strangers hold nothing.
 */
import type { TLSSocket } from 'node:tls';
import { Carrier, type CarrierOwner } from './carrier.ts';
import { encodeFrame } from './frame-encoder.ts';
import type { Frame, HelloFrame, RefuseReason } from './frames.ts';
import type { LinkLimits } from './limits.ts';

export interface ReceptionHandlers {
  /** Called at most once. */
  onHello(hello: HelloFrame, reception: Reception): void;
  /** The connection is gone, or a session has it. */
  onEnd(reception: Reception): void;
}

export class Reception {
  readonly #carrier: Carrier;
  readonly #limits: LinkLimits;
  readonly #handlers: ReceptionHandlers;
  #output: Uint8Array[] = [];
  #helloSeen = false;
  #timer: NodeJS.Timeout;

  constructor(socket: TLSSocket, limits: LinkLimits, handlers: ReceptionHandlers) {
    this.#limits = limits;
    this.#handlers = handlers;
    const owner: CarrierOwner = {
      onFrame: (frame) => this.#onFrame(frame),
      nextOutput: () => (this.#output.length > 0 ? this.#output.splice(0) : undefined),
      onTick() {},
      onLost: () => this.#end(),
    };
    this.#carrier = new Carrier(socket, limits, owner);
    this.#timer = setTimeout(() => this.close(), limits.helloTimeoutMs);
  }

  get isLost(): boolean {
    return this.#carrier.isLost;
  }

  /** Says why and waits until the client has hung up: if we did so first, the reason could be lost on its way. */
  refuse(reason: RefuseReason, why: { code: string; message: string }): void {
    this.#helloSeen = true;
    this.#output.push(encodeFrame({ type: 'refuse', reason, ...why }));
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.close(), this.#limits.helloTimeoutMs);
    this.#carrier.kick();
  }

  /** Lets the session have the connection; `attach` must hand the carrier to it. */
  welcome(position: { received: number; limit: number }, attach: (carrier: Carrier) => void): void {
    this.#output.push(encodeFrame({ type: 'welcome', ...position }));
    this.#carrier.kick();
    this.#end();
    attach(this.#carrier);
  }

  close(): void {
    this.#carrier.destroy();
    this.#end();
  }

  #onFrame(frame: Frame): void {
    // A client has nothing to say but HELLO before it is welcome.
    if (this.#helloSeen) return;
    if (frame.type !== 'hello') {
      this.refuse('protocol', { code: 'invalid_request', message: `Wanted HELLO, met ${frame.type}` });
      return;
    }
    this.#helloSeen = true;
    // The answer may depend on others; it has a bound of its own.
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.close(), this.#limits.giveUpMs);
    this.#handlers.onHello(frame, this);
  }

  #end(): void {
    clearTimeout(this.#timer);
    this.#handlers.onEnd(this);
  }
}
