/** The destination's dealings with the custodian of a VM that came by way of relays. */
import { once } from 'node:events';
import { setTimeout as sleep } from 'node:timers/promises';
import type { Static } from 'typebox';
import type * as schemas from '../../contract/schemas.ts';
import type { Escrow } from '../../migration/relayed/custody.ts';
import { encodeEscrow } from '../../migration/relayed/escrow.ts';
import type { Uuid } from '../../model/ids.ts';
import type { PeerSide } from './peer-side.ts';

const retryMs = 1000;
const doubtMs = 15_000;

export interface EscrowClientOptions {
  migrationId: Uuid;
  custodian: { id: Uuid; name: string };
  peers: Pick<PeerSide, 'open' | 'askCustodian'>;
  /** As they are when it is left there. */
  facts: () => Static<typeof schemas.EscrowFacts>;
  /** It does not answer; and it does again. */
  tell: { attention: (message: string) => void; goesOn: () => void };
}

export function escrowAt(options: EscrowClientOptions): Escrow {
  const { migrationId, custodian, peers, facts, tell } = options;

  /** Until it is done; the operator hears when that takes long. */
  async function patiently<Answer>(
    work: () => Promise<Answer>,
    doubt: string,
    signal: AbortSignal,
  ): Promise<Answer> {
    const startedAt = performance.now();
    let isTold = false;
    for (;;) {
      try {
        const answer = await work();
        if (isTold) tell.goesOn();
        return answer;
      } catch {
        signal.throwIfAborted();
        if (!isTold && performance.now() - startedAt > doubtMs) {
          isTold = true;
          tell.attention(doubt);
        }
        await sleep(retryMs, undefined, { signal });
      }
    }
  }

  return {
    deposit: (manifest, whole, signal) =>
      patiently(
        async () => {
          const session = await peers.open(custodian.id, 'escrow', { migrationId }, signal);
          try {
            const held = once(session, 'end', { signal });
            held.catch(() => {});
            session.resume();
            const bytes = {
              facts: Buffer.from(JSON.stringify(facts())),
              manifest: manifest.toBytes(),
              whole,
            };
            session.end(encodeEscrow(bytes));
            await held;
          } finally {
            if (!session.readableEnded) session.destroy();
          }
        },
        `${custodian.name} does not take what it needs to go on with the VM; its source stays until it does, or until all ` +
          'of the VM is here',
        signal,
      ),
    ask: async (isGone) => {
      try {
        return epochOf(await peers.askCustodian(custodian.id, migrationId, { isGone }));
      } catch {
        return undefined;
      }
    },
    release: (signal) =>
      patiently(
        async () => epochOf(await peers.askCustodian(custodian.id, migrationId, 'release')),
        `The VM is here, but ${custodian.name}, which may go on with it in our place, does not say that it will not. If ` +
          `${custodian.name} is gone for good, and has not claimed it, say so: viper vm claim`,
        signal,
      ),
  };
}

const epochOf = ({ claimed, epoch }: Static<typeof schemas.EscrowOwner>): number | undefined =>
  claimed ? epoch : undefined;
