/** The ticket of a migration at its destination: a secret, until when it is good, and the sessions that came with it. */
import { createHash, randomBytes, timingSafeEqual } from 'node:crypto';
import type { SessionPurpose, Ticket } from './protocol.ts';

export class TicketDesk {
  readonly #lifeMs: number;
  readonly #sessions = { disk: 0, memory: 0 };
  #ticket: Ticket | undefined;
  #expiry: NodeJS.Timeout | undefined;

  constructor(lifeMs: number) {
    this.#lifeMs = lifeMs;
  }

  get ticket(): Ticket | undefined {
    return this.#ticket;
  }

  /** For all sessions of a migration, the first of which has to come before it expires. */
  open(onExpired: () => void): void {
    this.#expiry = setTimeout(onExpired, this.#lifeMs);
    this.#ticket = this.#newTicket();
  }

  /** For a memory session in the place of one that was lost; whoever wants it asks until it comes. */
  reopenMemory(): void {
    this.#sessions.memory = 0;
    this.#ticket = this.#newTicket();
    this.#expiry = undefined;
  }

  /** Whether this is the secret, and no more than `most` sessions of the kind came before. */
  isGood(purpose: SessionPurpose, secret: string, most: number): boolean {
    if (!this.#ticket || this.#sessions[purpose] >= most) return false;
    return timingSafeEqual(digest(secret), digest(this.#ticket.secret));
  }

  /** A session has come: the ticket does not expire any more. */
  note(purpose: SessionPurpose): void {
    this.#sessions[purpose] += 1;
    this.close();
  }

  /** Nothing happens when it expires. */
  close(): void {
    clearTimeout(this.#expiry);
  }

  #newTicket(): Ticket {
    const expiresAt = new Date(Date.now() + this.#lifeMs).toISOString();
    return { secret: randomBytes(32).toString('hex'), expiresAt };
  }
}

const digest = (text: string): Buffer => createHash('sha256').update(text).digest();
