/**
 * The device's side of a connection that moves: its MPTCP endpoints, in the order in which connections survive. New
 * first, then wait until it carries something, then the old one goes: a VM that still believes in an old path sends its
 * next address there, where nobody hears it. For Linux with iproute2; programs use MPTCP by `mptcpize run` or by asking
 * for IPPROTO_MPTCP (262).
 *
 * Handover modes of the thesis (section 3.3.1), for a device with a radio and a cellular link: `full` uses all paths at
 * once, `backup` keeps the cellular path open and silent, `single-path` opens it when the radio has gone.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import type { Command, Run } from './commands.ts';
import { type MptcpEvent, parseMptcpEvent } from './mptcp-monitor.ts';
import { requireDeviceName } from './networks.ts';

export const handoverModes = ['full', 'backup', 'single-path'] as const;
export type HandoverMode = (typeof handoverModes)[number];

/** A way to the world: a network device with an address. */
export interface DevicePath {
  device: string;
  address: string;
}

export interface MptcpDeviceOptions {
  run: Run;
  /** Lines of `ip -t mptcp monitor` from now on, until the signal; see `monitorLines`. */
  monitor: (signal: AbortSignal) => AsyncIterable<string>;
  mode?: HandoverMode;
  cellular?: DevicePath;
  /** For a connection to come to a new path. */
  joinTimeoutMs?: number;
  /** The kernel tries a new path once; after so long without an answer it is made again, as another one. */
  joinAgainMs?: number;
}

export interface Roamed {
  /** Whether a connection carries something over the new path; `none` if there is no connection. */
  joined: 'yes' | 'no' | 'none';
}

/** After the first connection has joined, for the others, and for what each of them says next. */
const settleMs = 300;
const monitorAgainMs = 1000;
const cellularId = 251;
const radioIds = 250;

export const planLimits = (): Command[] => [
  ['ip', 'mptcp', 'limits', 'set', 'subflow', '8', 'add_addr_accepted', '8'],
];

/** `reach`: paths to all addresses of the other side, or only to the one by which the connection began. */
export function planEndpoint(
  id: number,
  { device, address }: DevicePath,
  { isBackup = false, reach = 'all' }: { isBackup?: boolean; reach?: 'all' | 'first' } = {},
): Command {
  const flags = ['subflow', ...(reach === 'all' ? ['fullmesh'] : []), ...(isBackup ? ['backup'] : [])];
  return [
    'ip',
    'mptcp',
    'endpoint',
    'add',
    address,
    'dev',
    requireDeviceName(device),
    'id',
    String(id),
    ...flags,
  ];
}

export const planEndpointRemoval = (id: number): Command => [
  'ip',
  'mptcp',
  'endpoint',
  'delete',
  'id',
  String(id),
];

export class MptcpDevice implements Disposable {
  readonly #options: MptcpDeviceOptions;
  readonly #mode: HandoverMode;
  #radio: { id: number; path: DevicePath } | undefined;
  /** Paths that were left while no connection had another. */
  #leftIds: number[] = [];
  #hasCellular = false;
  #lastId = 0;
  readonly #listeners = new Set<(event: MptcpEvent) => void>();
  readonly #closing = new AbortController();
  /** Aborted when the radio is in another LAN. */
  #present = new AbortController();

  constructor(options: MptcpDeviceOptions) {
    this.#options = options;
    this.#mode = options.mode ?? 'full';
  }

  /** Takes the device as it is: forgets endpoints that others have set. `radio` is missing while it is in no LAN. */
  async start(radio: DevicePath | undefined, signal: AbortSignal): Promise<void> {
    this.#listen().catch(() => {});
    await this.#do([['ip', 'mptcp', 'endpoint', 'flush'], ...planLimits()], signal);
    if (radio) await this.#addRadio(radio, signal);
    const { cellular } = this.#options;
    if (cellular && (this.#mode !== 'single-path' || !radio)) await this.#addCellular(cellular, signal);
  }

  /** The radio has lost its LAN. Connections live on over the cellular link, or wait for the next LAN. */
  async left(signal: AbortSignal): Promise<void> {
    const { cellular } = this.#options;
    if (cellular && !this.#hasCellular) await this.#addCellular(cellular, signal);
  }

  /**
   * The radio is in a new LAN, with the address there and a route. Resolves when the old path is given up, or kept as
   * nothing has come over the new one in time.
   */
  async arrived(path: DevicePath, signal: AbortSignal): Promise<Roamed> {
    const before = this.#radio;
    if (before && before.path.address === path.address && before.path.device === path.device)
      return { joined: 'none' };
    // Whoever still waits for a path that has been left gives it up.
    this.#present.abort();
    this.#present = new AbortController();
    if (before) this.#leftIds.push(before.id);
    return this.#join(path, AbortSignal.any([signal, this.#present.signal]));
  }

  /** Once more, where nothing has come over the present path: the way to the VM may have been cut until now. */
  async again(signal: AbortSignal): Promise<Roamed> {
    if (!this.#radio) return { joined: 'none' };
    const { path } = this.#radio;
    const either = AbortSignal.any([signal, this.#present.signal]);
    await this.#removeRadio(either);
    return this.#join(path, either);
  }

  async #join(path: DevicePath, signal: AbortSignal): Promise<Roamed> {
    const hasConnections = await this.#hasConnections(signal);
    const whenJoined = hasConnections ? this.#whenJoined(path.address, signal) : undefined;
    await this.#addRadio(path, signal);
    const hasJoined = whenJoined && (await this.#tryUntil(whenJoined, path, signal));
    const joined = hasJoined === undefined ? 'none' : hasJoined ? 'yes' : 'no';
    if (joined === 'no') return { joined };
    if (joined === 'yes') await sleep(settleMs, undefined, { signal });
    for (const id of this.#leftIds.splice(0)) await this.#do([planEndpointRemoval(id)], signal);
    if (this.#mode === 'single-path' && this.#hasCellular) {
      await this.#do([planEndpointRemoval(cellularId)], signal);
      this.#hasCellular = false;
    }
    return { joined };
  }

  async #tryUntil(whenJoined: Promise<boolean>, path: DevicePath, signal: AbortSignal): Promise<boolean> {
    const { joinAgainMs = 3000 } = this.#options;
    for (let isOdd = true; ; isOdd = !isOdd) {
      const hasJoined = await Promise.race([whenJoined, sleep(joinAgainMs, undefined, { signal })]);
      if (hasJoined !== undefined) return hasJoined;
      await this.#removeRadio(signal);
      // Between the two addresses where a connection began, the kernel's full mesh holds the path that it had first for
      // one that is there, though it has died.
      await this.#addRadio(path, signal, isOdd ? 'first' : 'all');
    }
  }

  async #removeRadio(signal: AbortSignal): Promise<void> {
    signal.throwIfAborted();
    const radio = this.#radio;
    this.#radio = undefined;
    if (radio) await this.#do([planEndpointRemoval(radio.id)], signal);
  }

  async #addRadio(path: DevicePath, signal: AbortSignal, reach: 'first' | 'all' = 'all'): Promise<void> {
    signal.throwIfAborted();
    this.#lastId = (this.#lastId % radioIds) + 1;
    await this.#do([planEndpoint(this.#lastId, path, { reach })], signal);
    this.#radio = { id: this.#lastId, path };
  }

  async #addCellular(path: DevicePath, signal: AbortSignal): Promise<void> {
    await this.#do([planEndpoint(cellularId, path, { isBackup: this.#mode === 'backup' })], signal);
    this.#hasCellular = true;
  }

  /** Whether a subflow from the address is established, as soon as it is. */
  async #whenJoined(address: string, signal: AbortSignal): Promise<boolean> {
    const { joinTimeoutMs = 10_000 } = this.#options;
    const { promise, resolve } = Promise.withResolvers<boolean>();
    const listener = ({ name, localAddress }: MptcpEvent): void => {
      if (name === 'SF_ESTABLISHED' && localAddress === address) resolve(true);
    };
    this.#listeners.add(listener);
    const either = AbortSignal.any([signal, AbortSignal.timeout(joinTimeoutMs)]);
    either.addEventListener('abort', () => resolve(false), { once: true });
    try {
      return await promise;
    } finally {
      this.#listeners.delete(listener);
    }
  }

  async #listen(): Promise<void> {
    const { signal } = this.#closing;
    // A monitor that ends is started again.
    while (!signal.aborted) {
      for await (const text of this.#options.monitor(signal)) {
        const event = parseMptcpEvent(text);
        if (event) for (const listener of [...this.#listeners]) listener(event);
      }
      await sleep(monitorAgainMs, undefined, { signal });
    }
  }

  /** Lets go; endpoints and connections stay as they are. */
  [Symbol.dispose](): void {
    this.#closing.abort();
  }

  async #hasConnections(signal: AbortSignal): Promise<boolean> {
    const { stdout } = await this.#options.run('ss', ['-HMn', 'state', 'established'], { signal });
    return stdout.trim() !== '';
  }

  async #do(commands: Command[], signal: AbortSignal): Promise<void> {
    for (const [program, ...args] of commands) await this.#options.run(program, args, { signal });
  }
}
