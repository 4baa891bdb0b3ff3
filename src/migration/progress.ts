/**
 * What is known of a migration at work, from what QEMU tells, in figures that never run backwards: a guest that
 * writes makes the total grow, and the bar wait.
 */
import {
  type DivisionStatistics,
  type EngineStatistics,
  type MigrationCost,
  type MigrationPhase,
  type MigrationProgress,
  type MigrationResult,
  migrationPhases,
} from '../model/migration.ts';
import type { MigrationInfo } from '../qmp/index.ts';
import { sumOf } from './condensed/statistics.ts';
import { DirtyMeter } from './dirtying.ts';
import type { MirrorProgress } from './mirror-policy.ts';

/** The bar ends only when the migration does. */
const mostBeforeTheEnd = 0.99;

/** What of the two goes condensed. */
export interface Condensed {
  memory?: EngineStatistics;
  disk?: EngineStatistics;
}

export class ProgressTracker {
  readonly #startedAt: number;
  readonly #now: () => number;
  readonly #memoryTotal: number;
  #phase: MigrationPhase = 'preflight';
  #fraction = 0;
  #disk: MirrorProgress = { doneBytes: 0, totalBytes: 0 };
  #memory: MigrationInfo = {};
  readonly #dirtying = new DirtyMeter();
  #throttlePercent = 0;
  #costThere: MigrationCost | undefined;
  #doneBytes = 0;
  #lastRate: { at: number; doneBytes: number } | undefined;
  #rateBps = 0;
  #pausedAt: number | undefined;
  #resumedAt: number | undefined;
  #endedAt: number | undefined;
  #wasPostcopy = false;
  readonly #enteredAt = new Map<MigrationPhase, number>();
  #condensed: Condensed = {};
  #relayed: DivisionStatistics | undefined;

  /** `diskBytes` as far as known before the mirror counts them; `now` in ms. */
  constructor(
    sizes: { memoryBytes: number; diskBytes: number },
    now: () => number = () => performance.now(),
  ) {
    this.#now = now;
    this.#startedAt = now();
    this.#enteredAt.set(this.#phase, this.#startedAt);
    this.#memoryTotal = sizes.memoryBytes;
    this.#disk.totalBytes = sizes.diskBytes;
  }

  /** A phase that lies behind is not entered again. */
  enter(phase: MigrationPhase): void {
    if (migrationPhases.indexOf(phase) > migrationPhases.indexOf(this.#phase)) {
      this.#phase = phase;
      this.#enteredAt.set(phase, this.#now());
    }
    if (phase === 'done') this.#endedAt ??= this.#now();
  }

  disk(progress: MirrorProgress): void {
    this.#disk = progress;
    this.#measure();
  }

  memory(info: MigrationInfo): void {
    this.#memory = info;
    this.#dirtying.note(info, this.#now());
    const throttlePercent = info['cpu-throttle-percentage'] ?? 0;
    // One percent stands for none; see memory-out.ts.
    if (throttlePercent > 1) this.#throttlePercent = Math.max(this.#throttlePercent, throttlePercent);
    this.#measure();
  }

  /** What the agents of the condensed engine have counted so far. */
  condensed(statistics: Condensed): void {
    this.#condensed = statistics;
    if (statistics.memory && statistics.memory.postcopyPages > 0) this.#wasPostcopy = true;
  }

  /** What relays were given so far. */
  relayed(statistics: DivisionStatistics): void {
    this.#relayed = statistics;
  }

  /** QEMU itself said that it is in post-copy: one that was asked for may end as pre-copy all the same. */
  enteredPostcopy(): void {
    this.#wasPostcopy = true;
  }

  /** The vCPUs stopped here. */
  paused(): void {
    this.#pausedAt ??= this.#now();
  }

  /** What the destination says of its own work. */
  costThere(cost: MigrationCost): void {
    this.#costThere = cost;
  }

  /** The destination said that they run there. */
  resumed(): void {
    this.#resumedAt ??= this.#now();
  }

  get progress(): MigrationProgress {
    const { ram, 'expected-downtime': expectedMs } = this.#memory;
    const remaining = this.#remaining();
    const total = this.#doneBytes + remaining;
    const reached =
      this.#phase === 'done' ? 1 : Math.min(mostBeforeTheEnd, this.#doneBytes / Math.max(1, total));
    this.#fraction = Math.max(this.#fraction, reached);
    return {
      phase: this.#phase,
      fraction: this.#fraction,
      round: ram?.['dirty-sync-count'] ?? 0,
      doneBytes: this.#doneBytes,
      totalBytes: total,
      dirtyBps: this.#dirtying.latestBps,
      rateBps: this.#rateBps,
      ...(this.#rateBps > 0 && { etaMs: Math.round((remaining * 8000) / this.#rateBps) }),
      ...(expectedMs !== undefined && { forecastDowntimeMs: expectedMs }),
    };
  }

  get result(): MigrationResult {
    const { ram, ...info } = this.#memory;
    const totalMs = (this.#endedAt ?? this.#now()) - this.#startedAt;
    const { memory, disk } = this.#condensed;
    const condensed = memory && disk ? sumOf(memory, disk) : (memory ?? disk);
    const memoryBytes = memory?.wireBytes ?? ram?.transferred ?? 0;
    const diskBytes = disk?.wireBytes ?? this.#disk.doneBytes;
    return {
      totalMs,
      ...(this.#pausedAt !== undefined &&
        this.#resumedAt !== undefined && { downtimeMs: this.#resumedAt - this.#pausedAt }),
      ...(info.downtime !== undefined && { qemuDowntimeMs: info.downtime }),
      setupMs: info['setup-time'] ?? 0,
      phaseMs: this.#phaseMs(),
      rounds: ram?.['dirty-sync-count'] ?? 0,
      memoryBytes,
      diskBytes,
      zeroPages: ram?.duplicate ?? 0,
      dirtyBps: this.#dirtying.meanBps,
      maxDirtyBps: this.#dirtying.maxBps,
      rateBps: Math.round(((memoryBytes + diskBytes) * 8000) / Math.max(1, totalMs)),
      throttlePercent: this.#throttlePercent,
      pageRequests: memory?.requestedPages ?? ram?.['postcopy-requests'] ?? 0,
      finishedAs: this.#wasPostcopy ? 'postcopy' : 'precopy',
      ...(condensed && { condensed }),
      ...(this.#endedAt !== undefined && { exitMs: this.#endedAt - this.#startedAt }),
      ...(this.#relayed && { relayed: this.#relayed }),
      ...(this.#costThere && { destination: this.#costThere }),
    };
  }

  #phaseMs(): Partial<Record<MigrationPhase, number>> {
    const entered = [...this.#enteredAt];
    return Object.fromEntries(
      entered.flatMap(([phase, from], at) => {
        if (phase === 'done') return [];
        const next = entered[at + 1]?.[1] ?? this.#endedAt ?? this.#now();
        const to = phase === 'switchover' ? Math.min(next, this.#resumedAt ?? next) : next;
        return [[phase, Math.round(to - from)]];
      }),
    );
  }

  #measure(): void {
    const done = this.#disk.doneBytes + (this.#memory.ram?.transferred ?? 0);
    this.#doneBytes = Math.max(this.#doneBytes, done);
    const at = this.#now();
    const last = this.#lastRate;
    if (last && at - last.at < 200) return;
    if (last) {
      const rate = ((this.#doneBytes - last.doneBytes) * 8000) / (at - last.at);
      // Smoothed, so that an ETA does not jump.
      this.#rateBps = Math.round(this.#rateBps === 0 ? rate : 0.7 * this.#rateBps + 0.3 * rate);
    }
    this.#lastRate = { at, doneBytes: this.#doneBytes };
  }

  #remaining(): number {
    if (this.#phase === 'done') return 0;
    const disk = Math.max(0, this.#disk.totalBytes - this.#disk.doneBytes);
    return disk + (this.#memory.ram?.remaining ?? this.#memoryTotal);
  }
}
