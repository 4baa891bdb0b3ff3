/**
 * The taps of this cloudlet's VMs: made before QEMU starts, taken away after it ended, strays removed at the start of
 * the daemon. Networks of kind `user` need no tap; a host that has only these needs no rights and no `ip`.
 */
import { AppError } from '../model/errors.ts';
import type { Uuid } from '../model/ids.ts';
import type { NetSpec } from '../model/vm.ts';
import { bringUp, type Run, takeDown } from './commands.ts';
import { type Link, listLinksCommand, parseLinks } from './links.ts';
import { type CloudletNetwork, findNetwork } from './networks.ts';
import { planTap, planTapRemoval, strayTaps, tapsOf } from './tap-plan.ts';

export interface TapsOptions {
  /** The cloudlet: its taps carry it. */
  owner: Uuid;
  networks: readonly CloudletNetwork[];
  run: Run;
  /** Sees to it, before taps of the VM carry anything, that it says no more than it may. */
  guard?: (vmId: Uuid) => Promise<void>;
  /** The bridge that an interface of a VM joins instead of its network's, if any: of a LAN that is stretched to it. */
  bridgeFor?: (vmId: Uuid, index: number) => string | undefined;
}

export class Taps {
  readonly #options: TapsOptions;

  constructor(options: TapsOptions) {
    this.#options = options;
  }

  /**
   * Makes a tap for each interface on a bridge and gives its name by interface, `null` for a user network. All or
   * nothing. Throws `unsupported` for a network or bridge that is not there, or rights that are missing.
   */
  async up(
    vmId: Uuid,
    nets: readonly NetSpec[],
    signal: AbortSignal = new AbortController().signal,
  ): Promise<(string | null)[]> {
    const { networks, owner, run } = this.#options;
    const wanted = nets.map(({ network }) => findNetwork(networks, network));
    if (wanted.every(({ kind }) => kind === 'user')) return wanted.map(() => null);
    const links = await this.#list(signal);
    const left = tapsOf(links, owner, vmId);
    for (const { name } of left) await takeDown(planTapRemoval(name), run);
    const others = links.filter((link) => !left.includes(link));

    await this.#options.guard?.(vmId);
    const names: (string | null)[] = [];
    await using undo = new AsyncDisposableStack();
    for (const [index, network] of wanted.entries()) {
      if (network.kind === 'user') {
        names.push(null);
        continue;
      }
      const bridge = this.#options.bridgeFor?.(vmId, index) ?? network.bridge;
      const { mtu } = requireBridge(links, network.name, bridge);
      const plan = planTap({ owner, vmId, index, bridge, mtu });
      requireFreeName(others, plan.name);
      await bringUp(plan, run, signal);
      undo.defer(() => takeDown(plan, run));
      names.push(plan.name);
    }
    undo.move();
    return names;
  }

  /** Takes away the taps of the VM; none is no error. */
  async down(vmId: Uuid): Promise<void> {
    const { networks, owner, run } = this.#options;
    if (networks.every(({ kind }) => kind === 'user')) return;
    for (const { name } of tapsOf(await this.#listIfAny(), owner, vmId))
      await takeDown(planTapRemoval(name), run);
  }

  /** Takes away the taps of VMs that are not among `vmIds`, and gives their names. For the start of the daemon. */
  async removeStrays(vmIds: Iterable<Uuid>): Promise<string[]> {
    const { owner, run } = this.#options;
    const strays = strayTaps(await this.#listIfAny(), owner, vmIds).map(({ name }) => name);
    for (const name of strays) await takeDown(planTapRemoval(name), run);
    return strays;
  }

  async #list(signal: AbortSignal): Promise<Link[]> {
    const [program, ...args] = listLinksCommand;
    return parseLinks((await this.#options.run(program, args, { signal })).stdout);
  }

  /** Where `ip` is not installed, nobody can have made a tap. */
  async #listIfAny(): Promise<Link[]> {
    try {
      return await this.#list(new AbortController().signal);
    } catch (error) {
      if (error instanceof AppError && error.code === 'unsupported') return [];
      throw error;
    }
  }
}

function requireBridge(links: readonly Link[], network: string, bridge: string): Link {
  const link = links.find(({ name }) => name === bridge);
  if (link?.kind === 'bridge') return link;
  const met = link ? `is no bridge but ${link.kind ?? 'another device'}` : 'is not there';
  throw new AppError(
    'unsupported',
    `Join network ${network}: ${bridge} ${met}, wanted a bridge of this host`,
    {
      missing: `bridge ${bridge}`,
    },
  );
}

/** `ip tuntap add` would quietly take over a tap of that name. */
function requireFreeName(links: readonly Link[], name: string): void {
  if (links.every((link) => link.name !== name)) return;
  throw new AppError(
    'unsupported',
    `Make tap: the host has another device named ${name}, wanted a free name`,
    {
      missing: `device name ${name}`,
    },
  );
}
