/** The other cloudlet of a migration: messages as HTTPS requests, since each may be lost; bytes in sessions of the link. */
import type { Static } from 'typebox';
import type * as schemas from '../../contract/schemas.ts';
import type { CloudletIdentity } from '../../fleet/index.ts';
import { connectEarly, type EarlyConnection, openSession, type Session } from '../../link/index.ts';
import type { Merged, SessionPurpose, Ticket, ToDestination, ToSource } from '../../migration/protocol.ts';
import { AppError } from '../../model/errors.ts';
import type { Peer } from '../../model/fleet.ts';
import type { Uuid } from '../../model/ids.ts';
import type { RelayHolds } from '../../relay/index.ts';
import type { Fleet } from '../fleet.ts';
import type { LinkLimits } from './link-limits.ts';

/** `sessions-lost`: the daemon at the source was started again, and nobody will resume the sessions of the one before. */
export type Message = ToDestination | ToSource | Merged | { name: 'sessions-lost' };

/** Short: a message that does not come through is sent again soon. */
const messageTimeoutMs = 3000;

/** A cut of the link must cost no more than its own time, also when it falls on the moment of opening. */
const openTimeoutMs = 60_000;
/** There are others. */
const relayOpenTimeoutMs = 5000;
/** How long a relay keeps what nobody asks for: a destination that is cut off, or whose daemon is away, comes back. */
const relayLeaseS = 1800;
/** Of a disk, as long as the VM is not whole without it. */
export const arrivingDiskLeaseS = 24 * 3600;

export const linkPurposes = {
  disk: 'viper-disk/1',
  memory: 'viper-memory/1',
  image: 'viper-image/1',
  relay: 'viper-relay/1',
  snapshot: 'viper-snapshot/1',
  escrow: 'viper-escrow/1',
} as const;

export class PeerSide {
  readonly #identity: () => CloudletIdentity;
  readonly #fleet: Fleet;
  readonly limits: LinkLimits;
  /** Connections for sessions to come, by peer and purpose. */
  readonly #early = new Map<string, EarlyConnection>();

  constructor(options: { identity: () => CloudletIdentity; fleet: Fleet; linkLimits: LinkLimits }) {
    this.#identity = options.identity;
    this.#fleet = options.fleet;
    this.limits = options.linkLimits;
  }

  /** By id or by name. */
  find(reference: string): Peer {
    const found = this.#fleet.peers().find(({ id, name }) => id === reference || name === reference);
    if (found) return found;
    const { id, name } = this.#identity();
    const itself = reference === id || reference === name ? ': that is this cloudlet itself' : '';
    const message = `There is no peer '${reference}'${itself}`;
    throw new AppError('not_found', message, { kind: 'peer', name: reference });
  }

  /** What does not fit for the VM to come there, and whether its image is there. */
  async check(
    peer: Peer,
    id: Uuid,
    body: Static<typeof schemas.CheckMigration>,
  ): Promise<Static<typeof schemas.MigrationCheck>> {
    const answer = await this.#fleet.client.fetch(peer, `/v1/migrations/${id}/check`, {
      method: 'POST',
      json: body,
    });
    const told = (answer ?? {}) as Partial<Static<typeof schemas.MigrationCheck>>;
    const { problems, hasImage, sets, canPostcopy } = told;
    if (Array.isArray(problems) && typeof hasImage === 'boolean')
      return {
        problems,
        hasImage,
        canPostcopy: canPostcopy === true,
        ...(Array.isArray(sets) ? { sets } : {}),
      };
    throw new AppError('peer_unreachable', `${peer.url} did not say whether the VM fits`, { url: peer.url });
  }

  async send(peerId: Uuid, id: Uuid, message: Message): Promise<void> {
    await this.#fleet.client.fetch(this.find(peerId), `/v1/migrations/${id}/messages`, {
      method: 'POST',
      json: message,
      timeoutMs: messageTimeoutMs,
    });
  }

  /** Whose a VM is that the custodian may go on with; `release`: and from then on it is ours, unless it was claimed. */
  async askCustodian(
    custodianId: Uuid,
    id: Uuid,
    what: 'release' | { isGone: boolean },
  ): Promise<Static<typeof schemas.EscrowOwner>> {
    const isRelease = what === 'release';
    const query = isRelease ? '' : `?gone=${what.isGone}`;
    const answer = await this.#fleet.client.fetch(this.find(custodianId), `/v1/escrows/${id}/owner${query}`, {
      method: isRelease ? 'DELETE' : 'GET',
      timeoutMs: messageTimeoutMs,
    });
    const { claimed, epoch } = (answer ?? {}) as Partial<Static<typeof schemas.EscrowOwner>>;
    if (claimed === false) return { claimed };
    if (claimed === true && Number.isSafeInteger(epoch)) return { claimed, epoch: epoch! };
    throw new AppError('peer_unreachable', 'The custodian did not say whose the VM is', { custodianId });
  }

  /**
   * Sees to it that the next message need not wait for a connection: TCP and TLS take two round trips, which nobody
   * has left when the VM stands still.
   */
  async warm(peerId: Uuid): Promise<void> {
    await this.#fleet.client
      .fetch(this.find(peerId), '/healthz', { timeoutMs: messageTimeoutMs })
      .catch(() => {});
  }

  /** Begins to connect for a session whose ticket is still to come. */
  expect(peerId: Uuid, purpose: SessionPurpose): void {
    const key = `${peerId} ${purpose}`;
    this.#early.get(key)?.[Symbol.dispose]();
    this.#early.set(
      key,
      connectEarly({
        url: this.find(peerId).url,
        tls: () => this.#identity().tls,
        expectCloudletId: peerId,
        identify: this.#fleet.identify,
        purpose: linkPurposes[purpose],
      }),
    );
  }

  #takeEarly(peerId: Uuid, purpose: string): EarlyConnection | undefined {
    const key = `${peerId} ${purpose}`;
    const early = this.#early.get(key);
    this.#early.delete(key);
    return early;
  }

  /** A session for bytes of the VM, with the right that the ticket gives. */
  openSession(
    peerId: Uuid,
    migrationId: Uuid,
    purpose: SessionPurpose,
    ticket: Ticket,
    signal: AbortSignal,
  ): Promise<Session> {
    return this.open(peerId, purpose, { migrationId, secret: ticket.secret }, signal);
  }

  /** A session with a relay, for whoever knows the secret of a migration's slabs. */
  openRelay(
    relayId: Uuid,
    migrationId: Uuid,
    group: string,
    holds: RelayHolds,
    leaseS = relayLeaseS,
  ): Promise<Session> {
    const hello = { migrationId, group, leaseS, holds, shares: 1 };
    return this.open(relayId, 'relay', hello, undefined, relayOpenTimeoutMs);
  }

  async open(
    peerId: Uuid,
    purpose: keyof typeof linkPurposes,
    hello: Record<string, string | number> & { migrationId: Uuid },
    signal: AbortSignal | undefined,
    timeoutMs = openTimeoutMs,
  ): Promise<Session> {
    const session = await openSession({
      url: this.find(peerId).url,
      tls: () => this.#identity().tls,
      expectCloudletId: peerId,
      identify: this.#fleet.identify,
      purpose: linkPurposes[purpose],
      hello,
      ...(signal && { signal }),
      limits: { openTimeoutMs: timeoutMs },
      sharedLimits: this.limits.of(hello.migrationId),
      early: this.#takeEarly(peerId, purpose),
    });
    // Whoever reads or writes it meets the error there.
    session.on('error', () => {});
    return session;
  }
}
