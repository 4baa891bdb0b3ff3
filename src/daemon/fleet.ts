/**
 * The fleet as this daemon takes part in it: admits members, keeps the directory of peers fresh in the background,
 * and renews its own certificate long before it ends.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import type { FastifyBaseLogger } from 'fastify';
import {
  type Admission,
  acceptAnnouncement,
  acceptRemoval,
  admitMember,
  announce,
  announceRemoval,
  asPeer,
  type CloudletIdentity,
  certificateExpiresInDays,
  createJoinToken,
  FleetTrust,
  type JoinRequest,
  PeerClient,
  PeerDirectory,
  renewCertificate,
  signRenewal,
  syncPeers,
} from '../fleet/index.ts';
import type { Identify } from '../link/index.ts';
import { asAppError } from '../model/errors.ts';
import type { Peer } from '../model/fleet.ts';
import type { Uuid } from '../model/ids.ts';
import type { Principal } from './credentials.ts';
import type { EventLog } from './events.ts';
import type { Store } from './store/index.ts';

const refreshEveryMs = 60_000;
const renewBeforeDays = 30;

export interface FleetOptions {
  identity: CloudletIdentity;
  store: Store;
  events: EventLog;
  log: FastifyBaseLogger;
  /** Called with the identity that has the new certificate. */
  onRenewed: (identity: CloudletIdentity) => void;
}

export class Fleet {
  readonly trust: FleetTrust;
  readonly directory: PeerDirectory;
  readonly client: PeerClient;
  readonly #options: FleetOptions;
  readonly #closing = new AbortController();
  #identity: CloudletIdentity;
  #refreshing: Promise<void> | undefined;
  readonly #listeners = new Set<() => void>();

  constructor(options: FleetOptions) {
    const { identity, store } = options;
    this.#options = options;
    this.#identity = identity;
    this.directory = new PeerDirectory(store, identity.id);
    this.trust = new FleetTrust(identity, this.directory);
    this.client = new PeerClient(identity);
  }

  /** Who a certificate of a connection of the link names. */
  readonly identify: Identify = (certificate) => {
    const found = this.trust.identify(certificate);
    if (found === undefined) return { refused: 'its certificate is not of this fleet' };
    return typeof found === 'string'
      ? { refused: `its certificate is ${found}` }
      : { cloudletId: found.cloudletId };
  };

  /** Called whenever a peer has come or gone. */
  onChanged(listener: () => void): void {
    this.#listeners.add(listener);
  }

  /** Tells the fleet of this cloudlet now and then learns of others every minute. */
  start(): void {
    this.#refreshing = this.#refreshForever();
  }

  async #refreshForever(): Promise<void> {
    const { signal } = this.#closing;
    const { founderId } = this.#identity;
    const call = { peers: this.directory, client: this.client, signal, founderId };
    let announced = false;
    while (!signal.aborted) {
      try {
        if (!announced) {
          const { failed } = await announce({ ...call, self: asPeer(this.#identity) });
          announced = failed.length === 0;
        }
        const { learned, removed } = await syncPeers(call);
        for (const peer of learned) this.#joined(peer);
        for (const peer of removed) this.#gone(peer);
        await this.#renewIfDue();
      } catch (error) {
        if (!signal.aborted)
          this.#options.log.warn({ err: error }, 'refreshing the fleet failed; it is tried again');
      }
      // At its end, also one that came while the fleet was asked, it is over at once.
      await sleep(refreshEveryMs, undefined, { signal }).catch(() => {});
    }
  }

  async #renewIfDue(): Promise<void> {
    if (certificateExpiresInDays(this.#identity) > renewBeforeDays) return;
    const founder = this.#identity.founderId && this.directory.get(this.#identity.founderId);
    const sign = founder
      ? async (csr: string) => {
          const answer = await this.client.fetch(founder, '/v1/fleet/renewals', {
            method: 'POST',
            json: { csr },
          });
          return String((answer as { certificate?: unknown }).certificate);
        }
      : undefined;
    this.#identity = await renewCertificate(this.#identity, sign ? { sign } : {});
    this.client.useIdentity(this.#identity);
    this.#options.onRenewed(this.#identity);
    this.#options.log.info('the certificate of this cloudlet was renewed');
  }

  #joined(peer: Peer): void {
    this.#options.events.append({
      kind: 'peer.joined',
      data: { peerId: peer.id, name: peer.name, url: peer.url },
    });
    for (const listener of this.#listeners) listener();
  }

  peers(): Peer[] {
    return this.directory.list();
  }

  /** Errors: `unsupported` at a cloudlet that did not found the fleet. */
  createJoinToken(expiresInS: number): { token: string; expiresAt: string } {
    return createJoinToken(this.#options.store, this.#identity, { expiresInS });
  }

  async admit(request: JoinRequest): Promise<Admission> {
    const { store } = this.#options;
    const admission = await admitMember(
      { identity: this.#identity, state: store, peers: this.directory },
      request,
    );
    const peer = this.directory.get(request.id);
    if (peer) this.#joined(peer);
    return admission;
  }

  /** A new certificate for the member that asks, by the one that it has shown. */
  async renew(caller: Principal, csr: string): Promise<{ certificate: string }> {
    const admitter = { identity: this.#identity, peers: this.directory };
    return { certificate: await signRenewal(admitter, { cloudletId: cloudletOf(caller), csr }) };
  }

  /** A peer has told of itself. */
  announced(peer: Peer, caller: Principal): void {
    const isNew = this.directory.get(peer.id) === undefined;
    if (acceptAnnouncement(this.directory, { cloudletId: cloudletOf(caller) }, peer) && isNew)
      this.#joined(peer);
  }

  /** From the founder it spreads at once, and to those who cannot be reached now when they ask again. */
  remove(id: Uuid): void {
    this.#gone(this.directory.remove(id, Date.now()));
    if (this.#identity.founderId !== undefined) return;
    const call = { peers: this.directory, client: this.client, signal: this.#closing.signal, removed: id };
    announceRemoval(call).catch((error) => {
      if (!this.#closing.signal.aborted)
        this.#options.log.warn({ err: error }, 'telling of a removal failed');
    });
  }

  /** The founder tells that a cloudlet is out. */
  removalAnnounced(id: Uuid, caller: Principal): void {
    const by = { cloudletId: cloudletOf(caller) };
    const gone = acceptRemoval(this.directory, by, this.#identity.founderId, id);
    if (gone) this.#gone(gone);
  }

  #gone({ id, name }: Peer): void {
    this.#options.events.append({ kind: 'peer.removed', data: { peerId: id, name } });
    for (const listener of this.#listeners) listener();
    this.client.forget(id);
  }

  async close(): Promise<void> {
    this.#closing.abort();
    await this.#refreshing?.catch((error) => this.#options.log.error({ err: asAppError(error) }, 'fleet'));
    this.client.close();
  }
}

/** The contract lets only cloudlets call these routes. */
function cloudletOf(caller: Principal): Uuid {
  if (caller.kind !== 'cloudlet') throw new TypeError(`caller ${caller.name} is no cloudlet`);
  return caller.cloudletId;
}
