/** A cloudlet that lends memory. What it gives back it gives slowly, so that the VM runs long before it is whole. */
import { Duplex, duplexPair, Transform } from 'node:stream';
import { newId } from '../../src/model/ids.ts';
import { MiB } from '../../src/model/units.ts';
import { memoryShelf, PassOn, SlabStore, serveSlabs } from '../../src/relay/index.ts';

export class LabRelay {
  readonly id = newId();
  readonly name: string;
  readonly store = new SlabStore({
    shelf: memoryShelf,
    quotaBytes: 256 * MiB,
    availableBytes: () => Number.MAX_SAFE_INTEGER,
    now: () => performance.now(),
  });
  readonly #sessions = new Set<Duplex>();
  readonly #givesBytesPerSecond: number;
  /** To which it gives slabs on. */
  others: readonly LabRelay[] = [];
  #isDead = false;

  constructor(name: string, givesBytesPerSecond: number) {
    this.name = name;
    this.#givesBytesPerSecond = givesBytesPerSecond;
  }

  serve(session: Duplex, group: string, isSlow: boolean): void {
    session.on('error', () => {});
    if (this.#isDead) {
      session.destroy();
      return;
    }
    this.#sessions.add(session);
    this.store.attach(group, 60_000);
    session.once('close', () => {
      this.#sessions.delete(session);
      this.store.detach(group);
    });
    const served = isSlow ? paced(session, this.#givesBytesPerSecond) : session;
    const passOn = new PassOn(async (id) => {
      const [near, far] = duplexPair();
      this.others.find((other) => other.id === id)!.serve(far, group, false);
      return near;
    });
    serveSlabs({ store: this.store, group, session: served, passOn }).catch(() => {});
  }

  /** Its daemon is gone, and with it all that it held. */
  die(): void {
    this.#isDead = true;
    for (const session of this.#sessions) session.destroy();
  }
}

/** The same stream, which takes no more than this. */
function paced(stream: Duplex, bytesPerSecond: number): Duplex {
  const slow = new Transform({
    transform(chunk: Buffer, _encoding, done) {
      setTimeout(done, (chunk.length * 1000) / bytesPerSecond, null, chunk);
    },
  });
  slow.pipe(stream);
  slow.on('error', () => {});
  stream.once('close', () => slow.destroy());
  const both = Duplex.from({ readable: stream, writable: slow });
  both.on('error', () => {});
  return both;
}
