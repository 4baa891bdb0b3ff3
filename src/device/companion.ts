/**
 * What runs on a Linux device whose VM follows it: tells its cloudlet of each new LAN at once and of round trips now and
 * then, keeps the MPTCP paths of its connections in order, and goes on with the cloudlet to which the VM has moved.
 *
 * The new address is told and the new path is made at the same time: the VM starts on its way while connections join.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import type { DevicePath, MptcpDevice } from '../network/index.ts';
import type { DeviceStatus, NodeViper } from '../sdk/node.ts';

/** What the device is attached to now. */
export interface Attachment {
  /** Missing while the radio is in no LAN. */
  radio?: DevicePath;
  /** Of all its links, the one in use first. */
  addresses: string[];
  macs: string[];
}

export type CompanionEvent =
  | { kind: 'arrived'; address: string }
  | { kind: 'left' }
  | { kind: 'joined'; joined: 'yes' | 'no' | 'none' }
  | { kind: 'reported'; lan: string | undefined }
  | { kind: 'vm-at'; cloudlet: string; url: string }
  | { kind: 'unreachable'; url: string; message: string };

export interface CompanionOptions {
  /** The cloudlet that the device knows first. */
  url: string;
  connect: (url: string) => NodeViper;
  attachment: () => Attachment;
  /** Round trip to a cloudlet in ms; undefined if it does not answer. */
  measure: (url: string, signal: AbortSignal) => Promise<number | undefined>;
  /** Round trip in ms that the connections to this address have had of late; undefined if there are none. */
  measureConnections?: (address: string, signal: AbortSignal) => Promise<number | undefined>;
  /** Left out where the device has no MPTCP. */
  mptcp?: Pick<MptcpDevice, 'start' | 'left' | 'arrived' | 'again'>;
  onEvent: (event: CompanionEvent) => void;
  lookEveryMs?: number;
  reportEveryMs?: number;
}

const answerMs = 5000;
const measureMs = 1500;

export class DeviceCompanion {
  readonly #options: CompanionOptions;
  readonly #lookEveryMs: number;
  readonly #reportEveryMs: number;
  #url: string;
  #viper: NodeViper;
  /** Where else somebody may know where the VM is. */
  #otherUrls: string[] = [];
  #isReachable = true;
  #neighbours: DeviceStatus['neighbours'] = [];
  #ownId: string | undefined;
  #vmAddress: string | undefined;
  #radioAddress: string | undefined;

  constructor(options: CompanionOptions) {
    this.#options = options;
    this.#lookEveryMs = options.lookEveryMs ?? 100;
    this.#reportEveryMs = options.reportEveryMs ?? 5000;
    this.#url = options.url;
    this.#viper = options.connect(options.url);
  }

  /** Where the VM is, as far as the device knows. */
  get url(): string {
    return this.#url;
  }

  /** Runs until the signal aborts, and then resolves. */
  async run(signal: AbortSignal): Promise<void> {
    const { attachment, mptcp } = this.#options;
    let before = attachment();
    await mptcp?.start(before.radio, signal);
    const listening = this.#listen(signal);
    const joining = new Set<Promise<void>>();
    let dueAtMs = 0;
    while (!signal.aborted) {
      const now = attachment();
      const hasMoved = now.radio?.address !== before.radio?.address;
      before = now;
      this.#radioAddress = now.radio?.address;
      if (hasMoved) {
        this.#reconnect();
        const joined = this.#moved(now, signal).finally(() => joining.delete(joined));
        joining.add(joined);
      }
      if ((hasMoved && now.addresses.length > 0) || Date.now() >= dueAtMs) {
        // Of a new LAN first, and of what it is like there afterwards.
        const told = await this.#report(now, [], signal);
        if (told) await this.#report(now, await this.#measureAll(signal), signal);
        dueAtMs = Date.now() + (told ? this.#reportEveryMs : this.#lookEveryMs * 5);
      }
      await sleep(this.#lookEveryMs, undefined, { signal }).catch(() => {});
    }
    await Promise.allSettled([listening, ...joining]);
    await this.#viper.close();
  }

  async #moved({ radio }: Attachment, signal: AbortSignal): Promise<void> {
    const { mptcp, onEvent } = this.#options;
    onEvent(radio ? { kind: 'arrived', address: radio.address } : { kind: 'left' });
    if (!mptcp) return;
    if (!radio) return mptcp.left(signal).catch(() => {});
    const orNot = () => ({ joined: 'no' as const });
    let { joined } = await mptcp.arrived(radio, signal).catch(orNot);
    onEvent({ kind: 'joined', joined });
    // A connection without a path dies after a minute, and nobody else would make it another one.
    const isHere = () => !signal.aborted && this.#radioAddress === radio.address;
    while (joined === 'no' && isHere()) {
      ({ joined } = await mptcp.again(signal).catch(orNot));
      if (joined !== 'no') onEvent({ kind: 'joined', joined });
      else await sleep(this.#lookEveryMs, undefined, { signal }).catch(() => {});
    }
  }

  async #report(
    { addresses, macs }: Attachment,
    rtts: { cloudletId: string; rttMs: number }[],
    signal: AbortSignal,
  ): Promise<boolean> {
    const { onEvent } = this.#options;
    const url = this.#url;
    try {
      const until = AbortSignal.any([signal, AbortSignal.timeout(answerMs)]);
      const status = await this.#viper.reportDevice({ body: { addresses, macs, rtts }, signal: until });
      this.#isReachable = true;
      this.#ownId = status.cloudlet.id;
      this.#neighbours = status.neighbours;
      this.#vmAddress = status.vmAddress;
      onEvent({ kind: 'reported', lan: status.device.lan?.name });
      const { vmIsHere, vmAt } = status.device;
      if (!vmIsHere && vmAt) this.#goOnAt(vmAt.name, vmAt.url);
      return true;
    } catch (error) {
      if (signal.aborted) return false;
      if (this.#isReachable) onEvent({ kind: 'unreachable', url, message: (error as Error).message });
      this.#isReachable = false;
      this.#tryAnother(url);
      return false;
    }
  }

  #goOnAt(cloudlet: string, url: string): void {
    if (url === this.#url) return;
    this.#use(url);
    this.#options.onEvent({ kind: 'vm-at', cloudlet, url });
  }

  #use(url: string): void {
    this.#otherUrls = [...new Set([...this.#otherUrls, this.#url])].filter((each) => each !== url).slice(-8);
    this.#url = url;
    this.#reconnect();
  }

  /** Connections from an address that is gone would answer nothing for a long time. */
  #reconnect(): void {
    const left = this.#viper;
    this.#viper = this.#options.connect(this.#url);
    left.close().catch(() => {});
  }

  /** A cloudlet where the VM was knows where it went. */
  #tryAnother(silentUrl: string): void {
    const next = this.#otherUrls.find((url) => url !== silentUrl);
    if (next && this.#url === silentUrl) this.#use(next);
  }

  async #measureAll(signal: AbortSignal): Promise<{ cloudletId: string; rttMs: number }[]> {
    const targets = [...(this.#ownId ? [{ id: this.#ownId, url: this.#url }] : []), ...this.#neighbours];
    const until = AbortSignal.any([signal, AbortSignal.timeout(measureMs)]);
    const { measure } = this.#options;
    const measured = await Promise.all(
      targets.map(async ({ id, url }) => ({
        id,
        rttMs: (id === this.#ownId ? await this.#measureVm(until) : undefined) ?? (await measure(url, until)),
      })),
    );
    return measured.flatMap(({ id, rttMs }) => (rttMs === undefined ? [] : [{ cloudletId: id, rttMs }]));
  }

  /** What the connections to the VM have measured anyway needs no probe. */
  async #measureVm(signal: AbortSignal): Promise<number | undefined> {
    const { measureConnections } = this.#options;
    if (this.#vmAddress === undefined) return undefined;
    return measureConnections?.(this.#vmAddress, signal).catch(() => undefined);
  }

  /** What the cloudlet tells by itself: where the VM is now. */
  async #listen(signal: AbortSignal): Promise<void> {
    while (!signal.aborted) {
      const viper = this.#viper;
      const over = new AbortController();
      const changed = setInterval(() => viper !== this.#viper && over.abort(), this.#lookEveryMs);
      try {
        const both = AbortSignal.any([signal, over.signal]);
        for await (const { kind, data } of viper.deviceEvents({ signal: both })) {
          const { name, url } = (data.cloudlet ?? {}) as { name?: unknown; url?: unknown };
          if (kind !== 'device.vm-moved' || typeof url !== 'string') continue;
          this.#goOnAt(String(name), url);
        }
      } catch {
        // Reports tell when the cloudlet is away; the stream is opened again.
      } finally {
        clearInterval(changed);
      }
      await sleep(this.#lookEveryMs, undefined, { signal }).catch(() => {});
    }
  }
}
