/**
 * The sessions of a server.
 *
 * Invariants: a session belongs to the cloudlet and the purpose that opened it and to whoever knows its secret; for
 * everybody else it does not exist. Only the newest connection of a session has it. Their number is bounded, of
 * all cloudlets and of each.
 */
import { timingSafeEqual } from 'node:crypto';
import { AppError } from '../model/errors.ts';
import { publicReason } from './errors.ts';
import type { HelloFrame } from './frames.ts';
import type { JsonObject } from './json.ts';
import type { LinkLimits } from './limits.ts';
import { LinkSession } from './link-session.ts';
import type { LinkPurpose } from './purposes.ts';
import type { Reception } from './reception.ts';
import type { SharedLimits } from './sender.ts';
import type { Session } from './session.ts';

/** What is known of a session before it exists. */
export interface SessionRequest {
  purpose: LinkPurpose;
  cloudletId: string;
  hello: JsonObject;
}

export interface AcceptedSession {
  /** Gets the session when it is connected, and must handle its errors. */
  onSession: (session: Session) => void;
  /** Of what our end sends. */
  sharedLimits?: SharedLimits | undefined;
}

export type AcceptSession = (request: SessionRequest) => AcceptedSession | Promise<AcceptedSession>;

export interface SessionTableOptions {
  accept: AcceptSession;
  limits: LinkLimits;
  maxSessions: number;
  maxSessionsPerPeer: number;
}

/** A session, or one that is being judged. */
interface Entry {
  request: SessionRequest;
  secret: Uint8Array;
  /** Of the newest connection. */
  attempt: number;
  /** The newest connection, while the session is being judged. */
  reception: Reception | undefined;
  verdict: Promise<AcceptedSession | { failure: unknown }>;
  session: LinkSession | undefined;
  /** Forgets an entry whose client has not come back for its session. */
  expiry: NodeJS.Timeout;
}

export class SessionTable {
  readonly #options: SessionTableOptions;
  readonly #entries = new Map<string, Entry>();

  constructor(options: SessionTableOptions) {
    this.#options = options;
  }

  get sessions(): Session[] {
    return [...this.#entries.values()].flatMap(({ session }) => session ?? []);
  }

  /** Finds or makes the session, and gives it the connection unless a newer one comes meanwhile. */
  async admit(
    reception: Reception,
    peer: { purpose: LinkPurpose; cloudletId: string },
    hello: HelloFrame,
  ): Promise<void> {
    const known = this.#entries.get(hello.sessionId);
    if (known ? !belongs(known, peer, hello) : hello.kind === 'resume') {
      return reception.refuse('unknown_session', unknownSession);
    }
    if (known && hello.attempt <= known.attempt) return reception.refuse('stale', staleConnection);
    const full = known ? undefined : this.#whyFull(peer.cloudletId);
    if (full) return reception.refuse('too_many', publicReason(full));
    const entry = known ?? this.#judge({ ...peer, hello: hello.metadata }, hello);
    entry.attempt = hello.attempt;
    entry.reception?.close();
    entry.reception = reception;
    const verdict = await entry.verdict;
    if (entry.reception !== reception || reception.isLost) return;
    entry.reception = undefined;
    // It may have ended meanwhile.
    if (this.#entries.get(hello.sessionId) !== entry || !belongs(entry, peer, hello)) {
      return reception.refuse('unknown_session', unknownSession);
    }
    if ('failure' in verdict) {
      this.#forget(hello.sessionId, entry);
      return reception.refuse('rejected', publicReason(verdict.failure));
    }
    this.#connect(entry, verdict, hello, reception);
  }

  /** Ends every session; nothing is left when it resolves. */
  async close(reason: AppError): Promise<void> {
    const entries = [...this.#entries];
    for (const [id, entry] of entries) this.#forget(id, entry);
    await Promise.all(entries.map(([, { session }]) => session?.abandon(reason)));
  }

  #judge(request: SessionRequest, hello: HelloFrame): Entry {
    const { accept, limits } = this.#options;
    const verdict = (async () => accept(request))().catch((failure: unknown) => ({ failure }));
    const expiry = setTimeout(() => this.#forget(hello.sessionId, entry), limits.giveUpMs);
    const entry: Entry = {
      request,
      secret: hello.secret,
      attempt: 0,
      reception: undefined,
      verdict,
      session: undefined,
      expiry,
    };
    this.#entries.set(hello.sessionId, entry);
    return entry;
  }

  #connect(entry: Entry, accepted: AcceptedSession, hello: HelloFrame, reception: Reception): void {
    clearTimeout(entry.expiry);
    const known = entry.session;
    const session = known ?? this.#create(entry, accepted, hello.sessionId);
    reception.welcome(session.position, (carrier) => session.attach(carrier, hello));
    if (!known) accepted.onSession(session);
  }

  #create(entry: Entry, { sharedLimits }: AcceptedSession, id: string): LinkSession {
    const { limits } = this.#options;
    const session = new LinkSession({ id, ...entry.request }, { side: 'server', limits, sharedLimits });
    entry.session = session;
    session.gone.then(() => this.#forget(id, entry));
    return session;
  }

  #forget(id: string, entry: Entry): void {
    clearTimeout(entry.expiry);
    entry.reception?.close();
    if (this.#entries.get(id) === entry) this.#entries.delete(id);
  }

  #whyFull(cloudletId: string): AppError | undefined {
    const { maxSessions, maxSessionsPerPeer } = this.#options;
    const ofPeer = [...this.#entries.values()].filter((each) => each.request.cloudletId === cloudletId);
    if (this.#entries.size >= maxSessions) return tooMany(maxSessions, 'in all');
    if (ofPeer.length >= maxSessionsPerPeer) return tooMany(maxSessionsPerPeer, 'of one cloudlet');
    return undefined;
  }
}

const belongs = (
  entry: Entry,
  peer: { purpose: LinkPurpose; cloudletId: string },
  hello: HelloFrame,
): boolean =>
  timingSafeEqual(entry.secret, hello.secret) &&
  entry.request.cloudletId === peer.cloudletId &&
  entry.request.purpose === peer.purpose &&
  (entry.session?.wantsConnection ?? true);

const unknownSession = {
  code: 'interrupted',
  message: 'This cloudlet does not know the session; maybe its daemon was restarted',
};
const staleConnection = { code: 'wrong_state', message: 'A newer connection has the session' };

const tooMany = (most: number, of: string): AppError =>
  new AppError('too_many', `The cloudlet holds ${most} sessions ${of}, which is the most`, { most });
