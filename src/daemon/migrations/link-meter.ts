/** What the sessions of one migration have put on the link, and how fast the link has shown to be. */
import type { Session, SessionStats } from '../../link/index.ts';
import type { LinkUse } from '../../model/migration.ts';

export class LinkMeter {
  readonly #sessions = new Set<Session>();
  readonly #ended: SessionStats[] = [];
  #fastestBps = 0;
  #rttMs: number | undefined;

  add(session: Session): void {
    this.#sessions.add(session);
    session.once('close', () => {
      if (this.#sessions.delete(session)) this.#ended.push(session.stats);
    });
  }

  /** Looks at how fast bytes arrive: sessions at work share the link. */
  sample(): void {
    let rateBps = 0;
    for (const { stats } of this.#sessions) {
      rateBps += stats.deliveryRateBps;
      if (stats.rttMs !== null) this.#rttMs = stats.rttMs;
    }
    this.#fastestBps = Math.max(this.#fastestBps, rateBps);
  }

  /** Undefined before anything was sent. */
  get use(): LinkUse | undefined {
    const all = [...this.#ended, ...[...this.#sessions].map(({ stats }) => stats)];
    const sum = (of: (stats: SessionStats) => number): number =>
      all.reduce((total, stats) => total + of(stats), 0);
    const sentBytes = sum((stats) => stats.sentBytes);
    if (sentBytes === 0) return undefined;
    return {
      sentBytes,
      resentBytes: sum((stats) => stats.resentBytes),
      receivedBytes: sum((stats) => stats.receivedBytes),
      reconnects: sum((stats) => stats.reconnects),
      rateBps: Math.round(this.#fastestBps),
      ...(this.#rttMs === undefined ? {} : { rttMs: Math.round(this.#rttMs * 10) / 10 }),
    };
  }
}
