/**
 * One session of a relay: takes slabs into the store, gives them on to other relays, and gives them back, those first
 * that a guest waits for.
 */
import { hash } from 'node:crypto';
import { once } from 'node:events';
import type { Duplex } from 'node:stream';
import { type ClientFrame, encodeFrame, FrameReader, type RelayFrame, relayError } from './frames.ts';
import type { PassOn } from './pass-on.ts';
import type { SlabStore } from './slab-store.ts';
import { Turns } from './turns.ts';

/** A client asks for what it can take; one that asks for more is none of ours. */
const mostWaiting = 8192;
/** Slabs out of a file that are in memory at once, until another relay has taken them; and to be looked at. */
const mostPassing = 64;
const mostChecking = 4;

export interface ServeOptions {
  store: ServedStore;
  /** The name of the group in the store, to which the session is attached already. */
  group: string;
  session: Duplex;
  /**
   * The name in the store of the group with this secret. Missing where no group takes slabs of another, and for a client
   * that does not ask whether it may.
   */
  nameOf?: ((secret: string) => string) | undefined;
  /** Missing where nothing is given on to other relays. It is closed with the session. */
  passOn?: PassOn | undefined;
}

export type ServedStore = Pick<
  SlabStore<Buffer | Promise<Buffer>>,
  'put' | 'get' | 'drop' | 'prolong' | 'share' | 'whenHeld' | 'remove' | 'freeBytes'
>;

/** Resolves when the client has ended; throws what broke the session, and destroys it. */
export async function serveSlabs({ store, group, session, nameOf, passOn }: ServeOptions): Promise<void> {
  const answers = new Answers(session, find);
  const expected = new Map<number, () => void>();
  const [passing, checking] = [new Turns(mostPassing), new Turns(mostChecking)];
  let isOver = false;
  try {
    answers.add({ name: 'free', freeBytes: store.freeBytes, ...(nameOf && { canShare: true }) });
    await Promise.race([read(), answers.failed]);
    session.end();
  } catch (error) {
    session.destroy();
    throw error;
  } finally {
    isOver = true;
    for (const withdraw of expected.values()) withdraw();
    passOn?.close();
  }

  /** One that cannot be read any more is not there. */
  function find(slab: number): Found {
    const found = store.get(group, slab);
    return found instanceof Promise ? found.catch(() => undefined) : found;
  }

  function expect({ slab, digest }: Extract<ClientFrame, { name: 'expect' }>): void {
    if (expected.size + checking.waiting >= mostWaiting) throw relayError('more expectations than it may');
    const check = async () => {
      if (isOver) return;
      const bytes = await find(slab);
      const isRight = bytes !== undefined && hash('sha256', bytes, 'buffer').equals(digest);
      if (!isRight) store.remove(group, slab);
      answer({ name: 'here', slab, isRight, freeBytes: store.freeBytes });
    };
    const onHeld = () => {
      expected.delete(slab);
      void checking.run(check);
    };
    expected.get(slab)?.();
    expected.set(slab, () => {});
    const withdraw = store.whenHeld(group, slab, onHeld);
    if (expected.has(slab)) expected.set(slab, withdraw);
  }

  function pass({ slab, to }: Extract<ClientFrame, { name: 'pass' }>): void {
    if (passing.waiting >= mostWaiting) throw relayError('more to give on than it may');
    const give = async () => {
      if (isOver) return;
      const bytes = await find(slab);
      const isTaken = bytes !== undefined && (await passOn?.pass(to, slab, bytes)) === true;
      answer({ name: 'passed', slab, to, isTaken });
    };
    void passing.run(give);
  }

  /** What takes a while may come to its end after the session. */
  function answer(late: RelayFrame): void {
    if (!session.destroyed && !session.writableEnded) answers.add(late);
  }

  async function read(): Promise<void> {
    const reader = new FrameReader('client');
    for await (const bytes of session.iterator({ destroyOnReturn: false })) {
      // Whoever does not take the answers may ask nothing more.
      if (session.writableNeedDrain) await once(session, 'drain');
      reader.push(bytes);
      for (let next = reader.next(); next; next = reader.next()) {
        if (next.name === 'put') {
          const held = store.put(group, next.slab, next.bytes);
          const isHeld = held instanceof Promise ? await held : held;
          answers.add({ name: isHeld ? 'held' : 'full', slab: next.slab, freeBytes: store.freeBytes });
        } else if (next.name === 'get') {
          answers.give(next);
        } else if (next.name === 'pass') {
          pass(next);
        } else if (next.name === 'expect') {
          expect(next);
        } else if (next.name === 'share') {
          const isHeld = nameOf !== undefined && store.share(group, next.slab, nameOf(next.group));
          answers.add({ name: isHeld ? 'held' : 'full', slab: next.slab, freeBytes: store.freeBytes });
        } else if (next.name === 'keep') {
          store.prolong(group);
          answers.add({ name: 'kept' });
        } else {
          store.drop(group);
          answers.add({ name: 'free', freeBytes: store.freeBytes });
        }
      }
    }
    await answers.written();
  }
}

/** In memory it is there at once. */
type Found = Buffer | undefined | Promise<Buffer | undefined>;

type Get = Extract<ClientFrame, { name: 'get' }>;

/** Answers on their way out: small ones at once, slabs one after the other as the client takes them. */
class Answers {
  readonly #session: Duplex;
  readonly #find: (slab: number) => Found;
  readonly #urgent: Get[] = [];
  readonly #others: Get[] = [];
  readonly #failed = Promise.withResolvers<never>();
  #isGiving = false;
  #last: Promise<void> = Promise.resolve();

  constructor(session: Duplex, find: (slab: number) => Found) {
    this.#session = session;
    this.#find = find;
    this.#failed.promise.catch(() => {});
    session.on('error', this.#failed.reject);
    session.on('close', () => this.#failed.reject(relayError('nothing any more')));
  }

  get failed(): Promise<never> {
    return this.#failed.promise;
  }

  add(answer: RelayFrame): void {
    for (const piece of encodeFrame(answer)) this.#session.write(piece);
  }

  give(get: Get): void {
    if (this.#urgent.length + this.#others.length >= mostWaiting)
      throw relayError('more requests than it may');
    (get.urgent ? this.#urgent : this.#others).push(get);
    if (!this.#isGiving) this.#last = this.#giveAll().catch(this.#failed.reject);
  }

  async written(): Promise<void> {
    await this.#last;
  }

  async #giveAll(): Promise<void> {
    this.#isGiving = true;
    for (;;) {
      const next = this.#urgent.shift() ?? this.#others.shift();
      if (!next) break;
      const { tag, slab, at, length } = next;
      const found = this.#find(slab);
      const bytes = (found instanceof Promise ? await found : found)?.subarray(at, at + length);
      const isThere = bytes?.length === length;
      await this.#write(isThere ? { name: 'slab', tag, bytes } : { name: 'absent', tag });
    }
    this.#isGiving = false;
  }

  /** Resolves when the link has taken it. */
  #write(answer: RelayFrame): Promise<void> {
    const pieces = encodeFrame(answer);
    return new Promise((resolve, reject) => {
      for (const [index, piece] of pieces.entries())
        this.#session.write(piece, (error) => {
          if (error) reject(error);
          else if (index === pieces.length - 1) resolve();
        });
    });
  }
}
