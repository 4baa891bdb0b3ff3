/**
 * Memory and disk space that this cloudlet lends to the migrations of others. What is lent is set by an operator and
 * outlives the daemon; what was given to it does not, nor does it outlive its lease. The two are kept apart: slabs of
 * memory never go to disk.
 */
import { createHash } from 'node:crypto';
import { statfsSync } from 'node:fs';
import { freemem } from 'node:os';
import path from 'node:path';
import type { Duplex } from 'node:stream';
import type { Static } from 'typebox';
import type * as schemas from '../../contract/schemas.ts';
import type { AcceptedSession, SessionRequest } from '../../link/index.ts';
import { AppError } from '../../model/errors.ts';
import { isUuid, type Uuid } from '../../model/ids.ts';
import {
  FileShelf,
  longestDiskLeaseMs,
  memoryShelf,
  PassOn,
  type RelayHolds,
  type ServedStore,
  SlabStore,
  serveSlabs,
} from '../../relay/index.ts';
import type { EventLog } from '../events.ts';
import type { Store } from '../store/index.ts';
import { withFault } from './fault.ts';

type Status = Static<typeof schemas.Relay>;

export interface RelayServiceOptions {
  store: Pick<Store, 'meta' | 'transact'>;
  events: EventLog;
  /** Lent until an operator says otherwise. */
  configured: Record<RelayHolds, number>;
  /** For slabs of disks; emptied at start. */
  directory: string;
  /** Of its file system, never lent. */
  reserveBytes: number;
  isDraining: () => boolean;
  /** The name of a cloudlet of the fleet. */
  nameOf: (cloudletId: string) => string | undefined;
  /** A session of the group with another relay, to which slabs are given on. */
  openRelay: (relayId: Uuid, migrationId: Uuid, group: string, holds: RelayHolds) => Promise<Duplex>;
  availableBytes?: () => number;
}

const metaKeys = { memory: 'relayMemoryBytes', disk: 'relayDiskBytes' } as const;
const lent = { memory: 'memory', disk: 'disk space' } as const;
const expireEveryMs = 5000;

interface Lending {
  holds: RelayHolds;
  migrationId: string;
  /** The cloudlet that came first, with the slabs. */
  cloudlet: string;
}

export class RelayService {
  readonly #options: RelayServiceOptions;
  readonly #stores: { memory: SlabStore; disk: SlabStore<Promise<Buffer>> };
  /** As those see them who come for them. */
  readonly #served: Record<RelayHolds, ServedStore>;
  readonly #lendings = new Map<string, Lending>();
  readonly #timer: NodeJS.Timeout;

  constructor(options: RelayServiceOptions) {
    this.#options = options;
    const { store, configured, directory, reserveBytes, availableBytes = freemem } = options;
    const quotaOf = (holds: RelayHolds): number => {
      const set = store.meta.get(metaKeys[holds]);
      return set === undefined ? configured[holds] : Number(set);
    };
    const freeOnDisk = (): number => {
      const { bavail, bsize } = statfsSync(path.dirname(directory));
      return bavail * bsize - reserveBytes;
    };
    const now = () => performance.now();
    this.#stores = {
      memory: new SlabStore({ shelf: memoryShelf, quotaBytes: quotaOf('memory'), availableBytes, now }),
      disk: new SlabStore({
        shelf: new FileShelf(directory),
        quotaBytes: quotaOf('disk'),
        availableBytes: freeOnDisk,
        now,
        longestLeaseMs: longestDiskLeaseMs,
      }),
    };
    this.#served = { memory: withFault(this.#stores.memory), disk: this.#stores.disk };
    this.#timer = setInterval(() => this.#expire(), expireEveryMs).unref();
  }

  /** What it would take now, as other cloudlets are told. */
  freeBytes(holds: RelayHolds): number {
    return this.#options.isDraining() ? 0 : this.#served[holds].freeBytes;
  }

  get status(): Status {
    const { memory, disk } = this.#stores;
    const migrations = [...memory.groups(), ...disk.groups()].map(([group, { slabs, bytes }]) => ({
      ...this.#lendings.get(group)!,
      slabs,
      bytes,
    }));
    return {
      memoryBytes: memory.quotaBytes,
      usedBytes: memory.usedBytes,
      freeBytes: this.freeBytes('memory'),
      disk: {
        lentBytes: disk.quotaBytes,
        usedBytes: disk.usedBytes,
        freeBytes: this.freeBytes('disk'),
      },
      migrations,
    };
  }

  /** From now on; 0 lends nothing more, and what is held stays until its lease ends. */
  lend({ memoryBytes, diskBytes = 0 }: { memoryBytes: number; diskBytes?: number }): Status {
    const { store, events } = this.#options;
    const isOn = memoryBytes > 0 || diskBytes > 0;
    store.transact(() => {
      store.meta.set(metaKeys.memory, String(memoryBytes));
      store.meta.set(metaKeys.disk, String(diskBytes));
      events.append({ kind: isOn ? 'relay.on' : 'relay.off', data: { memoryBytes, diskBytes } });
    });
    this.#stores.memory.setQuota(memoryBytes);
    this.#stores.disk.setQuota(diskBytes);
    return this.status;
  }

  /** A session of the source or of the destination of a migration. */
  accept({ hello, cloudletId }: SessionRequest): AcceptedSession {
    const { migrationId, group: secret, leaseS, holds = 'memory', shares } = hello;
    const isSound =
      typeof migrationId === 'string' &&
      isUuid(migrationId) &&
      typeof secret === 'string' &&
      /^[0-9a-f]{64}$/.test(secret) &&
      Number.isInteger(leaseS) &&
      (holds === 'memory' || holds === 'disk');
    if (!isSound)
      throw new AppError('invalid_request', 'This is no session of a relay', {
        problems: [{ field: 'hello', wanted: 'migrationId, group, leaseS, holds' }],
      });
    const group = groupOf(secret);
    const isNew = !this.#lendings.has(group);
    if (isNew && this.freeBytes(holds) === 0)
      throw new AppError('insufficient_memory', `This cloudlet lends no ${lent[holds]} now`, {
        freeBytes: 0,
      });
    const slabs = this.#stores[holds];
    return {
      onSession: (session) => {
        session.on('error', () => {});
        if (!slabs.attach(group, (leaseS as number) * 1000)) {
          session.destroy(new AppError('too_many', 'This cloudlet lends memory to too many migrations', {}));
          return;
        }
        if (isNew)
          this.#begin(group, {
            holds,
            migrationId,
            cloudlet: this.#options.nameOf(cloudletId) ?? cloudletId,
          });
        // The secret is known as long as the session is there, for only with it others take what is given on.
        const passOn = new PassOn((relay) => this.#options.openRelay(relay, migrationId, secret, holds));
        // A file has the slabs of one group. A client that does not say that it shares may be older than that.
        const nameOf = holds === 'memory' && shares === 1 ? groupOf : undefined;
        serveSlabs({ store: this.#served[holds], group, session, nameOf, passOn })
          // Whoever is at the other end knows what it means.
          .catch(() => {})
          .finally(() => {
            slabs.detach(group);
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
    for (const slabs of [this.#stores.memory, this.#stores.disk]) slabs.expire();
    this.#forgetEmpty();
  }

  #forgetEmpty(): void {
    for (const [group, lending] of this.#lendings) {
      if (this.#stores[lending.holds].groups().has(group)) continue;
      this.#lendings.delete(group);
      this.#options.events.append({ kind: 'relay.forgot', data: { ...lending } });
    }
  }
}

/** Whoever looks into this process finds no right to any slab. */
const groupOf = (secret: string): string => createHash('sha256').update(secret).digest('hex');
