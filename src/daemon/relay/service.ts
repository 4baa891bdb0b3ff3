/**
 * Memory that this cloudlet lends to the migrations of others. What is lent is set by an operator and outlives the
 * daemon; what was given to it does not, nor does it outlive its lease.
 */
import { createHash } from 'node:crypto';
import { freemem } from 'node:os';
import type { Duplex } from 'node:stream';
import type { Static } from 'typebox';
import type * as schemas from '../../contract/schemas.ts';
import type { AcceptedSession, SessionRequest } from '../../link/index.ts';
import { AppError } from '../../model/errors.ts';
import { isUuid, type Uuid } from '../../model/ids.ts';
import { longestLeaseMs, PassOn, type ServedStore, SlabStore, serveSlabs } from '../../relay/index.ts';
import type { EventLog } from '../events.ts';
import type { Store } from '../store/index.ts';
import { withFault } from './fault.ts';

type Status = Static<typeof schemas.Relay>;

export interface RelayServiceOptions {
  store: Pick<Store, 'meta' | 'transact'>;
  events: EventLog;
  /** Lent until an operator says otherwise. */
  configuredBytes: number;
  isDraining: () => boolean;
  /** The name of a cloudlet of the fleet. */
  nameOf: (cloudletId: string) => string | undefined;
  /** A session of the group with another relay, to which slabs are given on. */
  openRelay: (relayId: Uuid, migrationId: Uuid, group: string) => Promise<Duplex>;
  availableBytes?: () => number;
}

const metaKey = 'relayMemoryBytes';
const expireEveryMs = 5000;

interface Lending {
  migrationId: string;
  /** The cloudlet that came first, with the slabs. */
  cloudlet: string;
}

export class RelayService {
  readonly #options: RelayServiceOptions;
  readonly #slabs: SlabStore;
  /** As those see it who come for it. */
  readonly #served: ServedStore;
  readonly #lendings = new Map<string, Lending>();
  readonly #timer: NodeJS.Timeout;

  constructor(options: RelayServiceOptions) {
    this.#options = options;
    const set = options.store.meta.get(metaKey);
    this.#slabs = new SlabStore({
      quotaBytes: set === undefined ? options.configuredBytes : Number(set),
      availableBytes: options.availableBytes ?? freemem,
      now: () => performance.now(),
    });
    this.#served = withFault(this.#slabs);
    this.#timer = setInterval(() => this.#expire(), expireEveryMs).unref();
  }

  /** What it would take now, as other cloudlets are told. */
  get freeBytes(): number {
    return this.#options.isDraining() ? 0 : this.#served.freeBytes;
  }

  get status(): Status {
    const groups = [...this.#slabs.groups()].map(([group, { slabs, bytes }]) => {
      const { migrationId, cloudlet } = this.#lendings.get(group)!;
      return { migrationId, cloudlet, slabs, bytes };
    });
    const { quotaBytes, usedBytes } = this.#slabs;
    return { memoryBytes: quotaBytes, usedBytes, freeBytes: this.freeBytes, migrations: groups };
  }

  /** From now on; 0 lends nothing more, and what is held stays until its lease ends. */
  lend(memoryBytes: number): Status {
    const { store, events } = this.#options;
    store.transact(() => {
      store.meta.set(metaKey, String(memoryBytes));
      events.append({ kind: memoryBytes > 0 ? 'relay.on' : 'relay.off', data: { memoryBytes } });
    });
    this.#slabs.setQuota(memoryBytes);
    return this.status;
  }

  /** A session of the source or of the destination of a migration. */
  accept({ hello, cloudletId }: SessionRequest): AcceptedSession {
    const { migrationId, group: secret, leaseS } = hello;
    const isSound =
      typeof migrationId === 'string' &&
      isUuid(migrationId) &&
      typeof secret === 'string' &&
      /^[0-9a-f]{64}$/.test(secret) &&
      Number.isInteger(leaseS);
    if (!isSound)
      throw new AppError('invalid_request', 'This is no session of a relay', {
        problems: [{ field: 'hello', wanted: 'migrationId, group, leaseS' }],
      });
    const group = groupOf(secret);
    const isNew = !this.#lendings.has(group);
    if (isNew && this.freeBytes === 0)
      throw new AppError('insufficient_memory', 'This cloudlet lends no memory now', { freeBytes: 0 });
    return {
      onSession: (session) => {
        session.on('error', () => {});
        if (!this.#slabs.attach(group, Math.min((leaseS as number) * 1000, longestLeaseMs))) {
          session.destroy(new AppError('too_many', 'This cloudlet lends memory to too many migrations', {}));
          return;
        }
        if (isNew)
          this.#begin(group, { migrationId, cloudlet: this.#options.nameOf(cloudletId) ?? cloudletId });
        // The secret is known as long as the session is there, for only with it others take what is given on.
        const passOn = new PassOn((relay) => this.#options.openRelay(relay, migrationId, secret));
        serveSlabs({ store: this.#served, group, session, nameOf: groupOf, passOn })
          // Whoever is at the other end knows what it means.
          .catch(() => {})
          .finally(() => {
            this.#slabs.detach(group);
            this.#forgetEmpty();
          });
      },
    };
  }

  close(): void {
    clearInterval(this.#timer);
  }

  #begin(group: string, lending: Lending): void {
    if (this.#lendings.has(group)) return;
    this.#lendings.set(group, lending);
    this.#options.events.append({ kind: 'relay.lends', data: { ...lending } });
  }

  #expire(): void {
    this.#slabs.expire();
    this.#forgetEmpty();
  }

  #forgetEmpty(): void {
    const held = this.#slabs.groups();
    for (const [group, lending] of this.#lendings) {
      if (held.has(group)) continue;
      this.#lendings.delete(group);
      this.#options.events.append({ kind: 'relay.forgot', data: { ...lending } });
    }
  }
}

/** Whoever looks into this process finds no right to any slab. */
const groupOf = (secret: string): string => createHash('sha256').update(secret).digest('hex');
