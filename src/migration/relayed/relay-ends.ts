/** The source's sessions with the relays of a migration, and what is known of each of them. */
import type { Duplex } from 'node:stream';
import { AppError } from '../../model/errors.ts';
import type { Uuid } from '../../model/ids.ts';
import type { DivisionStatistics } from '../../model/migration.ts';
import { RelayClient } from '../../relay/index.ts';
import { mostRelays } from './division.ts';
import { passingWindowOf, type RelayView } from './placement.ts';
import { within } from './within.ts';

export interface RelayEnd {
  id: Uuid;
  name: string;
  /** A session of the group with it. */
  open: (group: string) => Promise<Duplex>;
}

/** One that has not heard by then that it is to keep what it has counts as lost. */
const prolongMs = 60_000;

interface End extends RelayEnd {
  client: RelayClient | undefined;
  slabs: number;
  bytes: number;
  /** Of slabs that it has, and is to give on to other relays. */
  passingBytes: number;
  /** It keeps what it has, though nobody may come for it for long. */
  isProlonged: boolean;
}

/** Relays go by their numbers. */
export class RelayEnds {
  readonly #ends: readonly End[];
  readonly #group: string;
  readonly #onChange: () => void;
  #isEnded = false;
  #isProlonging = false;

  /** `onChange`: one has been lost, or keeps what it has. */
  constructor(relays: readonly RelayEnd[], { group, onChange }: { group: string; onChange: () => void }) {
    this.#group = group;
    this.#onChange = onChange;
    this.#ends = relays.slice(0, mostRelays).map((relay) => ({
      ...relay,
      client: undefined,
      slabs: 0,
      bytes: 0,
      passingBytes: 0,
      isProlonged: false,
    }));
  }

  /** Opens a session with each, all at once; one that cannot be reached is done without. */
  async open(onLost: (relay: number) => void): Promise<void> {
    await Promise.all(
      this.#ends.map(async (end, relay) => {
        try {
          const client = new RelayClient(await end.open(this.#group));
          if (this.#isEnded) client.close();
          else end.client = client;
          void client.gone.then(() => onLost(relay));
        } catch (error) {
          if (!(error instanceof AppError)) throw error;
        }
      }),
    );
  }

  get ids(): Uuid[] {
    return this.#ends.map(({ id }) => id);
  }

  idOf(relay: number): Uuid {
    return this.#ends[relay]!.id;
  }

  /** Of one that there was a session with. */
  client(relay: number): RelayClient {
    return this.#ends[relay]!.client!;
  }

  /** So many of them have a session. */
  aliveOf(relays: Iterable<number>): number {
    return [...relays].filter((relay) => this.#ends[relay]!.client?.isAlive).length;
  }

  /** Those that may be asked to hold the slabs of other VMs, as far as is known: older ones know nothing of that. */
  get sharing(): number[] {
    const numbers = [...this.#ends.keys()];
    return numbers.filter((relay) => {
      const { client } = this.#ends[relay]!;
      return client?.isAlive === true && client.canShare !== false;
    });
  }

  /** What placement goes by; `asked`: those that are not to be asked any more. */
  views(asked: ReadonlySet<number> = new Set()): RelayView[] {
    return this.#ends.map(({ client }, relay) => ({
      canBeAsked: client?.isAlive === true && !asked.has(relay),
      freeBytes: client?.freeBytes ?? 0,
      inFlightBytes: client?.inFlightBytes ?? 0,
      expectedBytes: client?.expectedBytes ?? 0,
      bytesPerSecond: client?.bytesPerSecond,
    }));
  }

  /** How fast they take what is sent to them, all together. */
  get bytesPerSecond(): number {
    return this.#ends.reduce((sum, { client }) => sum + (client?.bytesPerSecond ?? 0), 0);
  }

  /** Bytes that went to them from here. */
  get sentBytes(): number {
    return this.#ends.reduce((sum, { client }) => sum + (client?.sentBytes ?? 0), 0);
  }

  get inFlightBytes(): number {
    return this.#ends.reduce((sum, { client }) => sum + (client?.inFlightBytes ?? 0), 0);
  }

  /** For so long what is on its way from here keeps the uplink busy, which other VMs may use as well. */
  get queuedMs(): number {
    return this.bytesPerSecond === 0 ? 0 : (this.inFlightBytes * 1000) / this.bytesPerSecond;
  }

  /** Unless it has much to give on as it is. */
  canPass(relay: number): boolean {
    const { client, passingBytes } = this.#ends[relay]!;
    return client?.isAlive === true && passingBytes < passingWindowOf(client.passedPerSecond);
  }

  /** From when it has a slab until it is given on. */
  countPassing(
    relay: number,
    bytes: number,
    { isTaken, isPassed }: { isTaken: Promise<boolean>; isPassed: Promise<boolean> },
  ): void {
    const end = this.#ends[relay]!;
    let isOver = false;
    const over = () => {
      isOver = true;
    };
    isPassed.then(over, over);
    isTaken
      .then(async (has) => {
        if (!has || isOver) return;
        end.passingBytes += bytes;
        await isPassed.finally(() => {
          end.passingBytes -= bytes;
        });
      })
      .catch(() => {});
  }

  /** These hold one more slab. */
  count(holders: Iterable<number>, bytes: number): void {
    for (const relay of holders) {
      this.#ends[relay]!.slabs += 1;
      this.#ends[relay]!.bytes += bytes;
    }
  }

  get statistics(): DivisionStatistics['relays'] {
    return this.#ends.map(({ name, slabs, bytes }) => ({ name, slabs, bytes }));
  }

  /** They are to keep what they have as long as they ever do. */
  prolong(): void {
    if (this.#isProlonging) return;
    this.#isProlonging = true;
    for (const end of this.#ends) void this.#prolong(end);
  }

  /** All do that are here. */
  get isProlonged(): boolean {
    return this.#ends.every(({ client, isProlonged }) => isProlonged || !client?.isAlive);
  }

  async #prolong(end: End): Promise<void> {
    const keeping = end.client?.prolong().then(
      () => true,
      () => false,
    );
    end.isProlonged = (await within(prolongMs, keeping ?? Promise.resolve(false))) === true;
    if (end.isProlonged) this.#onChange();
    else end.client?.close();
  }

  end({ drop }: { drop: boolean }): void {
    this.#isEnded = true;
    for (const { client } of this.#ends) {
      if (drop) client?.drop();
      client?.close();
    }
  }
}
