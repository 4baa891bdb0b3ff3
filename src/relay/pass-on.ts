/**
 * Gives slabs of one group on to other relays, over a session with each that is opened when it is first needed. So the
 * source sends each slab once, and relays make its replicas among themselves.
 */
import type { Duplex } from 'node:stream';
import type { Uuid } from '../model/ids.ts';
import { RelayClient } from './relay-client.ts';

/** A source that names more is none of ours. */
const mostRelays = 32;

export class PassOn {
  readonly #open: (relay: Uuid) => Promise<Duplex>;
  readonly #clients = new Map<Uuid, Promise<RelayClient>>();

  /** `open`: a session of the group with that relay. */
  constructor(open: (relay: Uuid) => Promise<Duplex>) {
    this.#open = open;
  }

  /** Whether that relay holds it now. */
  async pass(relay: Uuid, slab: number, bytes: Buffer): Promise<boolean> {
    try {
      return await (await this.#client(relay)).put(slab, bytes);
    } catch {
      // The source hears that it must do it by itself.
      return false;
    }
  }

  /** Nothing more is given on. */
  close(): void {
    for (const client of this.#clients.values()) client.then((one) => one.close()).catch(() => {});
    this.#clients.clear();
  }

  async #client(relay: Uuid): Promise<RelayClient> {
    if (!this.#clients.has(relay) && this.#clients.size >= mostRelays)
      throw new Error('more relays than there may be');
    const opening = this.#clients.get(relay) ?? this.#open(relay).then((session) => new RelayClient(session));
    this.#clients.set(relay, opening);
    try {
      const client = await opening;
      if (client.isAlive) return client;
      throw await client.gone;
    } catch (error) {
      // The next one tries again.
      if (this.#clients.get(relay) === opening) this.#clients.delete(relay);
      throw error;
    }
  }
}
