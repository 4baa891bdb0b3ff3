/**
 * What a migration costs the cloudlet on one of its sides, sampled while it runs: CPU time, bytes on disk, and how much
 * of its time the guest had.
 */
import { readdirSync, statSync } from 'node:fs';
import path from 'node:path';
import type { GuestShare, MigrationCost } from '../../model/migration.ts';
import { type CpuTime, readCpuTime } from '../../vm/cpu-time.ts';

const everyMs = 250;

export interface CostMeterOptions {
  /** The QEMU, as soon as there is one. */
  pid: () => number | undefined;
  /** Of the VM; what is in it besides what was there at first is the migration's. */
  directory: string;
  /** Runs with each sample. */
  onSample?: () => void;
}

export class CostMeter implements Disposable {
  readonly #options: CostMeterOptions;
  readonly #timer: NodeJS.Timeout;
  readonly #daemonAtFirst = process.cpuUsage();
  readonly #bytesAtFirst: number;
  #mostBytes = 0;
  #first: { at: number; time: CpuTime } | undefined;
  #last: { at: number; time: CpuTime } | undefined;
  #copyBegan: { at: number; time: CpuTime } | undefined;

  constructor(options: CostMeterOptions) {
    this.#options = options;
    this.#bytesAtFirst = allocatedBytes(options.directory);
    this.#timer = setInterval(() => this.sample(), everyMs).unref();
    this.sample();
  }

  sample(): void {
    const pid = this.#options.pid();
    const time = pid === undefined ? undefined : readCpuTime(pid);
    if (time) {
      this.#last = { at: performance.now(), time };
      this.#first ??= this.#last;
    }
    this.#mostBytes = Math.max(this.#mostBytes, allocatedBytes(this.#options.directory) - this.#bytesAtFirst);
    this.#options.onSample?.();
  }

  /** What the guest has from now on is what the migration leaves it. */
  copyBegins(): void {
    this.sample();
    this.#copyBegan ??= this.#last;
  }

  get cost(): MigrationCost {
    const { user, system } = process.cpuUsage(this.#daemonAtFirst);
    const qemuMs = (this.#last?.time.otherMs ?? 0) - (this.#first?.time.otherMs ?? 0);
    return { daemonCpuMs: Math.round((user + system) / 1000), qemuCpuMs: qemuMs, diskBytes: this.#mostBytes };
  }

  /** Undefined while there is no time before the copy to compare with. */
  get guestShare(): GuestShare | undefined {
    const before = share(this.#first, this.#copyBegan);
    const during = share(this.#copyBegan, this.#last);
    return before === undefined || during === undefined
      ? undefined
      : { beforePercent: before, duringPercent: during };
  }

  [Symbol.dispose](): void {
    clearInterval(this.#timer);
  }
}

/** Below this the ticks of the kernel's clock say nothing. */
const leastMs = 200;

function share(
  from: { at: number; time: CpuTime } | undefined,
  to: { at: number; time: CpuTime } | undefined,
): number | undefined {
  if (!from || !to || to.at - from.at < leastMs) return undefined;
  return Math.round((100 * (to.time.vcpuMs - from.time.vcpuMs)) / (to.at - from.at));
}

/** Of the files in it, holes left out. */
function allocatedBytes(directory: string): number {
  try {
    return readdirSync(directory).reduce((total, name) => total + fileBytes(path.join(directory, name)), 0);
  } catch {
    return 0;
  }
}

function fileBytes(file: string): number {
  return (statSync(file, { throwIfNoEntry: false })?.blocks ?? 0) * 512;
}
