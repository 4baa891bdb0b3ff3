/** One run of the bench, and the file to which each is appended, so that a grid can be measured in pieces. */
import { appendFile, mkdir, readFile, rm } from 'node:fs/promises';
import path from 'node:path';
import type { EngineStatistics } from '../../model/migration.ts';
import type { Step } from '../timeline.ts';
import type { Cell, Mover } from './grid.ts';

export interface Measured {
  converged: boolean;
  /** From the request until the source is free and the destination has everything; of one that never ends, the bound. */
  totalMs: number;
  /** The longest silence that the client saw from the request to half a second after the end. */
  gapMs: number;
  /** The same over a second before the request: what the machine alone does to it. */
  calmGapMs: number;
  downtimeMs?: number;
  /** Over the WAN, both ways, all headers included. */
  wireBytes: number;
  /** Of daemon and QEMU without its vCPUs. */
  cpuMs: { source: number; destination: number };
  /** Of it: what QEMU alone took. */
  qemuCpuMs?: { source: number; destination: number };
  rounds?: number;
  finishedAs?: string;
  condensed?: EngineStatistics;
  /** Viper's own steps, in ms from the request. */
  timeline?: Step[];
}

export interface Run extends Measured {
  at: string;
  commit: string;
  /** One-minute load of the machine before the run. */
  load: number;
  cell: Cell;
  mover: Mover;
  mode?: string;
}

export class Results<Item> {
  readonly #file: string;

  constructor(file: string) {
    this.#file = file;
  }

  async add(run: Item): Promise<void> {
    await mkdir(path.dirname(this.#file), { recursive: true });
    await appendFile(this.#file, `${JSON.stringify(run)}\n`);
  }

  async all(): Promise<Item[]> {
    const text = await readFile(this.#file, 'utf8').catch(() => '');
    return text
      .split('\n')
      .filter((line) => line !== '')
      .map((line) => JSON.parse(line));
  }

  async forget(): Promise<void> {
    await rm(this.#file, { force: true });
  }
}
