/** For tests: relays that speak the real protocol over streams in memory, and may do what they should not. */
import { randomBytes } from 'node:crypto';
import { Duplex, duplexPair } from 'node:stream';
import { AppError } from '../../model/errors.ts';
import { newId, type Uuid } from '../../model/ids.ts';
import { MiB } from '../../model/units.ts';
import { encodeFrame, frame } from '../../relay/frames.ts';
import { memoryShelf, PassOn, SlabStore, serveSlabs } from '../../relay/index.ts';
import type { RelayEnd } from './relay-ends.ts';

const shareBytes = encodeFrame({ name: 'share', slab: 1, group: '00'.repeat(32) })[0]!.length;

export interface RelayOptions {
  quotaBytes?: number;
  /** Dies when it is given more slabs than this. */
  diesAfter?: number;
  /** Changes a byte of what it gives back. */
  lies?: boolean;
  /** Says nothing to the destination. */
  isSilent?: boolean;
  /** Of a version that knows no SHARE, and takes it for a breach of the protocol. */
  isOld?: boolean;
  /** What it does with slabs that it is to give on. */
  passes?: 'them' | 'nothing' | 'late' | 'noise';
}

export class FakeRelay {
  readonly id: Uuid = newId();
  readonly store: SlabStore;
  readonly isSilent: boolean;
  /** All of them, it included. */
  others: readonly FakeRelay[] = [];
  readonly #isOld: boolean;
  readonly #passes: RelayOptions['passes'];
  readonly #sessions = new Set<Duplex>();
  isDead = false;

  constructor({
    quotaBytes = 64 * MiB,
    diesAfter,
    lies = false,
    isSilent = false,
    isOld = false,
    passes = 'them',
  }: RelayOptions = {}) {
    this.isSilent = isSilent;
    this.#isOld = isOld;
    this.#passes = passes;
    const store = new SlabStore({
      shelf: memoryShelf,
      quotaBytes,
      availableBytes: () => 2 ** 40,
      now: () => 0,
    });
    this.store = store;
    const [get, put] = [store.get.bind(store), store.put.bind(store)];
    let given = 0;
    store.get = (group, slab) => {
      const bytes = get(group, slab);
      if (!bytes || !lies) return bytes;
      const changed = Buffer.from(bytes);
      changed[5]! ^= 1;
      return changed;
    };
    store.put = (group, slab, bytes) => {
      given += 1;
      if (diesAfter !== undefined && given > diesAfter) this.die();
      return put(group, slab, bytes);
    };
  }

  async open(group: string): Promise<Duplex> {
    if (this.isDead) throw new AppError('peer_unreachable', 'The relay is dead');
    const [near, far] = duplexPair();
    this.#sessions.add(near);
    this.store.attach(group, 1000);
    const passOn = this.#passOn(group);
    const nameOf = this.#isOld ? undefined : (each: string) => each;
    serveSlabs({ store: this.store, group, session: far, nameOf, passOn }).catch(() => {});
    if (this.#isOld) refuseShares(near);
    return near;
  }

  #passOn(group: string): PassOn {
    const passOn = new PassOn((id) => this.others.find((other) => other.id === id)!.open(group));
    const pass = passOn.pass.bind(passOn);
    if (this.#passes === 'nothing') passOn.pass = async () => false;
    if (this.#passes === 'late') passOn.pass = () => new Promise(() => {});
    if (this.#passes === 'noise')
      passOn.pass = (relay, slab, bytes) => pass(relay, slab, randomBytes(bytes.length));
    return passOn;
  }

  /** As the destination sees it. */
  async openThere(group: string): Promise<Duplex> {
    if (!this.isSilent) return this.open(group);
    return new Duplex({ read() {}, write: (_bytes, _encoding, done) => done() });
  }

  die(): void {
    this.isDead = true;
    for (const session of this.#sessions) session.destroy(new AppError('peer_unreachable', 'The relay died'));
  }

  get slabs(): number {
    return [...this.store.groups().values()].reduce((sum, { slabs }) => sum + slabs, 0);
  }
}

/** It ends at the first frame that asks to share. */
function refuseShares(near: Duplex): void {
  const write = near.write.bind(near) as (...args: unknown[]) => boolean;
  near.write = ((bytes: Buffer, ...more: unknown[]) => {
    if (bytes[0] === frame.share && bytes.length === shareBytes)
      near.destroy(new AppError('peer_unreachable', 'A frame of type 6'));
    return write(bytes, ...more);
  }) as typeof near.write;
}

/** So many as there are options; each can give slabs on to the others. */
export function fakeRelays(options: readonly RelayOptions[]): FakeRelay[] {
  const relays = options.map((each) => new FakeRelay(each));
  for (const relay of relays) relay.others = relays;
  return relays;
}

/** As a divider knows them. */
export const endsOf = (relays: readonly FakeRelay[]): RelayEnd[] =>
  relays.map((relay, number) => ({ id: relay.id, name: `r${number}`, open: (group) => relay.open(group) }));
