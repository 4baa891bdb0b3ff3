/**
 * Keeps the WireGuard interface of this cloudlet in step with its VPN groups, where `follow.wireguard` is configured: made
 * when there is a peer, changed when a member comes or goes, taken away when none is left. It outlives the daemon.
 */
import type { FastifyBaseLogger } from 'fastify';
import type { WireguardSite } from '../../follow/index.ts';
import type { Uuid } from '../../model/ids.ts';
import {
  type Command,
  listPeersCommand,
  makeInKernel,
  makeInUserSpace,
  planWireguard,
  planWireguardRemoval,
  type Run,
  type WireguardInterface,
} from '../../network/index.ts';
import type { EventLog } from '../events.ts';
import { type GroupsInput, membersOf } from './groups.ts';

const lookEveryMs = 2000;
const commandTimeoutMs = 10_000;
/** What failed is tried again, in case somebody has installed what was missing. */
const tryAgainMs = 60_000;

export interface VpnOptions {
  groups: () => GroupsInput;
  run: Run;
  events: EventLog;
  log: FastifyBaseLogger;
}

export class Vpn {
  readonly #options: VpnOptions;
  #timer: NodeJS.Timeout | undefined;
  #isBusy = false;
  #done: string | undefined;
  /** Why it failed, told once. */
  #told: string | undefined;
  #failedAtMs = Number.NEGATIVE_INFINITY;

  constructor(options: VpnOptions) {
    this.#options = options;
  }

  start(): void {
    if (!this.#options.groups().config.wireguard) return;
    this.#timer = setInterval(() => void this.#look(), lookEveryMs).unref();
  }

  close(): void {
    clearInterval(this.#timer);
  }

  async #look(): Promise<void> {
    const { groups, events, log } = this.#options;
    if (this.#isBusy || performance.now() - this.#failedAtMs < tryAgainMs) return;
    this.#isBusy = true;
    try {
      const wanted = interfaceOf(groups());
      const text = JSON.stringify(wanted);
      if (text === this.#done) return;
      await this.#bring(wanted);
      this.#done = text;
      this.#told = undefined;
      events.append({ kind: 'vpn.changed', data: { peers: wanted.peers.length } });
    } catch (error) {
      this.#failedAtMs = performance.now();
      const reason = (error as Error).message.slice(0, 500);
      if (reason === this.#told) return;
      this.#told = reason;
      log.error({ err: error }, 'the tunnel to the members of the VPN groups is not up');
      events.append({ kind: 'vpn.failed', data: { reason } });
    } finally {
      this.#isBusy = false;
    }
  }

  async #bring(wanted: WireguardInterface): Promise<void> {
    const { owner, peers } = wanted;
    if (peers.length === 0) {
      for (const command of planWireguardRemoval(owner)) await this.#do(command).catch(() => {});
      return;
    }
    const list = () => this.#do(listPeersCommand(owner));
    const known = await list().catch(async () => {
      await this.#do(makeInKernel(owner)).catch(() => this.#do(makeInUserSpace(owner)));
      return list();
    });
    for (const command of planWireguard(wanted, known.split('\n').filter(Boolean))) await this.#do(command);
  }

  async #do([program, ...args]: Command): Promise<string> {
    return (await this.#options.run(program, args, { signal: AbortSignal.timeout(commandTimeoutMs) })).stdout;
  }
}

function interfaceOf(input: GroupsInput): WireguardInterface {
  const { identity, config } = input;
  const { address, port: listenPort, privateKeyFile } = config.wireguard!;
  const peers = membersOf(input).map(peerOf);
  return { owner: identity.id as Uuid, address, listenPort, privateKeyFile, peers };
}

const peerOf = ({ publicKey, endpoint: { host, port }, address, lans }: WireguardSite) => ({
  publicKey,
  endpoint: `${host.includes(':') ? `[${host}]` : host}:${port}`,
  allowedIps: [...(address === undefined ? [] : [`${address.split('/')[0]}/32`]), ...lans],
});
