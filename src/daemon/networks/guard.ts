/** Keeps the host's rules of what guests may send in step with the VMs that are here and those that come and go. */
import type { Uuid } from '../../model/ids.ts';
import type { VmRecord } from '../../model/vm.ts';
import {
  type CloudletNetwork,
  type Guarded,
  type GuardedTap,
  planGuard,
  planGuardRemoval,
  type Run,
  tapName,
} from '../../network/index.ts';
import type { HandoffRecord } from './record.ts';

export interface GuardOptions {
  owner: Uuid;
  networks: readonly CloudletNetwork[];
  run: Run;
  vms: () => VmRecord[];
  handoffs: () => HandoffRecord[];
}

const guardTimeoutMs = 30_000;

export class Guard {
  readonly #options: GuardOptions;
  #last: Promise<void> = Promise.resolve();

  constructor(options: GuardOptions) {
    this.#options = options;
  }

  /** Errors: `unsupported` where `nft` is missing; then no VM gets a tap. */
  update(): Promise<void> {
    const { networks } = this.#options;
    if (networks.every(({ kind }) => kind === 'user')) return Promise.resolve();
    // One after the other, each with what is so when its turn comes.
    const turn = this.#last.then(() => this.#update());
    this.#last = turn.catch(() => {});
    return turn;
  }

  async #update(): Promise<void> {
    const { owner, networks, run, vms, handoffs } = this.#options;
    const [program, ...args] = planGuard(owner, guardedBy(networks, vms(), handoffs()));
    await run(program, args, { signal: AbortSignal.timeout(guardTimeoutMs) });
  }

  /** For a host that is to be as it was. */
  async remove(): Promise<void> {
    for (const [program, ...args] of planGuardRemoval(this.#options.owner))
      await this.#options.run(program, args, { signal: AbortSignal.timeout(guardTimeoutMs) });
  }
}

/** What each tap may send. A VM on its way has its present address and its next one at both ends. */
export function guardedBy(
  networks: readonly CloudletNetwork[],
  vms: readonly VmRecord[],
  handoffs: readonly HandoffRecord[],
): Guarded {
  const taps = vms.flatMap(({ id, spec, attachment }) => {
    const places = handoffs
      .filter(({ vmId }) => vmId === id)
      .flatMap(({ handoff }) => [handoff.last, ...(handoff.next ? [handoff.next] : [])]);
    return spec.nets.flatMap(({ network, mac }, index): GuardedTap[] => {
      const found = networks.find(({ name }) => name === network);
      if (found?.kind !== 'bridge') return [];
      const addresses = [
        ...spec.seed.addresses.filter((each) => each.mac === mac).map(({ address }) => address),
        ...places.filter((each) => each.mac === mac).map(({ address }) => address),
        ...(attachment?.serving === index ? [attachment.place.address] : []),
      ].map((address) => address.split('/')[0]!);
      const ipv4 = [...new Set(addresses.filter((address) => !address.includes(':')))];
      const isGiven = found.addresses !== undefined;
      return [{ tap: tapName(id, index), mac, ...(isGiven ? { addresses: ipv4 } : {}) }];
    });
  });
  const tunnelRemotes = handoffs.flatMap(({ handoff: { tunnel, continuity } }) =>
    tunnel && continuity !== 'host-route' ? [tunnel.remote] : [],
  );
  return { taps, tunnelRemotes };
}
