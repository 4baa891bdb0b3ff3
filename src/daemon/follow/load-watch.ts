/** Watches how busy this host is, and which of its VMs make it so; says when one of them should go elsewhere. */
import { readFile } from 'node:fs/promises';
import {
  chooseVm,
  type Load,
  type LoadPolicy,
  loadMoved,
  newLoadState,
  observeLoad,
} from '../../follow/index.ts';
import type { Trigger } from '../../model/follow.ts';
import type { Uuid } from '../../model/ids.ts';
import type { VmRegistry } from '../vms/registry.ts';

const everyMs = 10_000;

export interface LoadWatchOptions {
  registry: VmRegistry;
  policy: LoadPolicy;
  /** Gives whether the VM goes. */
  onTrigger: (trigger: Trigger, vmId: Uuid) => Promise<boolean>;
}

interface Reading {
  busyTicks: number;
  allTicks: number;
  memory: number;
  totalMemoryBytes: number;
  vmTicks: Map<Uuid, number>;
}

export class LoadWatch implements Disposable {
  readonly #options: LoadWatchOptions;
  #state = newLoadState;
  #before: Reading | undefined;
  #now: Load | undefined;
  #timer: NodeJS.Timeout | undefined;
  #thinking = false;

  constructor(options: LoadWatchOptions) {
    this.#options = options;
  }

  /** Over the last seconds; undefined at the start. */
  get now(): Load | undefined {
    return this.#now;
  }

  start(): void {
    const look = () => this.#look().catch(() => {});
    this.#timer = setInterval(look, everyMs);
    this.#timer.unref();
    void look();
  }

  async #look(): Promise<void> {
    const { policy, onTrigger } = this.#options;
    const [before, reading] = [this.#before, await this.#read()];
    this.#before = reading;
    // Without a span of time there are no shares; memory needs none.
    const share = (ticks: number) => (before ? ticks / Math.max(1, reading.allTicks - before.allTicks) : 0);
    const cpu = before ? clamp(share(reading.busyTicks - before.busyTicks)) : 0;
    const load = { cpu, memory: clamp(reading.memory) };
    this.#now = load;
    if (!before) return;
    const { state, fired } = observeLoad(this.#state, load, Date.now(), policy);
    this.#state = state;
    if (!fired || this.#thinking) return;
    const vms = [...reading.vmTicks].map(([vmId, ticks]) => ({
      vmId,
      memoryBytes: this.#memoryOf(vmId),
      cpu: clamp(share(ticks - (before.vmTicks.get(vmId) ?? ticks))),
    }));
    const chosen = chooseVm(fired.kind, load, reading.totalMemoryBytes, vms, policy);
    if (!chosen) return;
    this.#thinking = true;
    try {
      // One that stays is not asked about again at each look: the cool-down counts for that, too.
      await onTrigger(fired, chosen.vmId);
      this.#state = loadMoved(this.#state, Date.now());
    } finally {
      this.#thinking = false;
    }
  }

  #memoryOf(vmId: Uuid): number {
    return (
      this.#options.registry.all().find(({ record }) => record.id === vmId)?.record.spec.memoryBytes ?? 0
    );
  }

  async #read(): Promise<Reading> {
    const [stat, meminfo] = await Promise.all([
      readFile('/proc/stat', 'utf8'),
      readFile('/proc/meminfo', 'utf8'),
    ]);
    const vmTicks = new Map<Uuid, number>();
    for (const { record } of this.#options.registry.all()) {
      if (record.state !== 'running' || !record.process) continue;
      const text = await readFile(`/proc/${record.process.pid}/stat`, 'utf8').catch(() => '');
      const ticks = processTicks(text);
      if (ticks !== undefined) vmTicks.set(record.id, ticks);
    }
    return { ...parseStat(stat), ...parseMemory(meminfo), vmTicks };
  }

  [Symbol.dispose](): void {
    clearInterval(this.#timer);
  }
}

/** The line `cpu` of /proc/stat, proc(5): user nice system idle iowait irq softirq steal ... */
export function parseStat(text: string): { busyTicks: number; allTicks: number } {
  const fields = (/^cpu +([\d ]+)$/m.exec(text)?.[1] ?? '').split(' ').map(Number).slice(0, 8);
  const allTicks = fields.reduce((sum, each) => sum + each, 0);
  const [, , , idle = 0, iowait = 0] = fields;
  return { allTicks, busyTicks: allTicks - idle - iowait };
}

export function parseMemory(text: string): { memory: number; totalMemoryBytes: number } {
  const kib = (name: string): number => Number(new RegExp(`^${name}: +(\\d+) kB$`, 'm').exec(text)?.[1] ?? 0);
  const total = kib('MemTotal');
  return { memory: total > 0 ? 1 - kib('MemAvailable') / total : 0, totalMemoryBytes: total * 1024 };
}

/** Fields 14 and 15 of /proc/PID/stat; the second field may hold blanks and parentheses. */
export function processTicks(text: string): number | undefined {
  const fields = text.slice(text.lastIndexOf(')') + 2).split(' ');
  const ticks = Number(fields[11]) + Number(fields[12]);
  return Number.isFinite(ticks) ? ticks : undefined;
}

const clamp = (share: number): number => Math.min(1, Math.max(0, share));
