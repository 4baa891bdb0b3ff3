/** The echo probe as a program at a place of a lab, for benches: when each answer came, and the silences between. */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { readFile, rm } from 'node:fs/promises';
import path from 'node:path';
import { createInterface } from 'node:readline';
import type { Lab } from '../lab.ts';
import { GapMeter } from './gap-meter.ts';

const program = path.join(import.meta.dirname, 'main.ts');
const answerTimeoutMs = 60_000;

export interface EchoClientOptions {
  lab: Lab;
  /** The place of the client. */
  at: string;
  /** ADDRESS:PORT. */
  to: string;
  intervalMs?: number;
}

export class EchoClient implements AsyncDisposable {
  readonly #child: ChildProcess;
  readonly #csv: string;

  private constructor(child: ChildProcess, csv: string) {
    this.#child = child;
    this.#csv = csv;
  }

  /** Resolves when the first answer has come. */
  static async start({ lab, at, to, intervalMs = 10 }: EchoClientOptions): Promise<EchoClient> {
    const csv = path.join(lab.directory, `echo-${process.pid}-${performance.now().toFixed(0)}.csv`);
    const argv = ['echo', '--to', to, '--interval', String(intervalMs), '--csv', csv];
    const [file, ...args] = lab.commandIn(at, [process.execPath, program, ...argv]);
    const child = spawn(file, args, { stdio: ['ignore', 'pipe', 'inherit'] });
    const client = new EchoClient(child, csv);
    const lines = createInterface({ input: child.stdout! });
    try {
      await once(lines, 'line', { signal: AbortSignal.timeout(answerTimeoutMs) });
    } catch (error) {
      await client[Symbol.asyncDispose]();
      throw new Error(`no answer from ${to} within ${answerTimeoutMs} ms`, { cause: error });
    }
    return client;
  }

  /** Ends it; then silences can be asked for. */
  async end(): Promise<Answers> {
    await this.#stop();
    const rows = (await readFile(this.#csv, 'utf8')).split('\n').slice(1, -1);
    return new Answers(rows.map((row) => Number(row.split(',')[2])));
  }

  async #stop(): Promise<void> {
    const child = this.#child;
    if (child.exitCode !== null || child.signalCode !== null) return;
    const ended = once(child, 'exit');
    child.kill('SIGTERM');
    await ended;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#stop();
    await rm(this.#csv, { force: true });
  }
}

/** When answers came, in ms since the epoch. */
export class Answers {
  readonly #times: readonly number[];

  constructor(times: readonly number[]) {
    this.#times = times;
  }

  /** The longest silence that lies in this time, if only in part: one that began before counts from its begin. */
  longestGapMs(fromMs: number, toMs: number): number {
    const meter = new GapMeter();
    const first = this.#times.findLastIndex((time) => time <= fromMs);
    for (const time of this.#times.slice(Math.max(0, first))) if (time <= toMs) meter.sign(time);
    const next = this.#times.find((time) => time > toMs);
    meter.end(next ?? toMs);
    return meter.longest?.ms ?? toMs - fromMs;
  }
}
