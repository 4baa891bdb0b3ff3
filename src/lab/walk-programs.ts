/**
 * What runs on the device of the walk: the companion that reports where it is, an echo every 10 ms and a stream whose
 * every byte is checked, each over one MPTCP connection; and a ping now and then.
 */
import { type ChildProcess, execFile, spawn } from 'node:child_process';
import { once } from 'node:events';
import path from 'node:path';
import { createInterface } from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';
import { promisify } from 'node:util';
import type { Lab } from '../src/lab/lab.ts';
import type { Command } from '../src/network/index.ts';

const launcher = path.resolve(import.meta.dirname, '../bin/viper');
const probes = path.resolve(import.meta.dirname, '../src/lab/probes/main.ts');
const patienceMs = 120_000;

interface Said {
  kind: string;
  [fact: string]: unknown;
}
export interface Gap {
  fromMs: number;
  toMs: number;
  ms: number;
}
export interface StreamEnd {
  verifiedBytes: number;
  brokenBy?: string;
}

interface Wanted {
  lab: Lab;
  device: string;
  companion: { url: string; caFile: string; token: string };
  /** HOST:PORT of the VM's servers. */
  echo: string;
  stream: string;
  onSample: (bps: number) => void;
}

/** A program of the device and what it has said so far, a JSON document a line. */
class Program implements AsyncDisposable {
  readonly said: Said[] = [];
  readonly #child: ChildProcess;

  constructor(
    [file, ...args]: Command,
    env: Record<string, string>,
    onLine: (line: Said) => void = () => {},
  ) {
    const child = spawn(file, args, { stdio: ['ignore', 'pipe', 'ignore'], env: { ...process.env, ...env } });
    this.#child = child;
    createInterface({ input: child.stdout! }).on('line', (text) => {
      const line = JSON.parse(text) as Said;
      if (line.kind !== 'sample') this.said.push(line);
      onLine(line);
    });
  }

  /** What it says at its end. */
  async end(): Promise<Said | undefined> {
    const child = this.#child;
    child.kill('SIGTERM');
    if (child.exitCode === null && child.signalCode === null) await once(child, 'close');
    return this.said.find(({ kind }) => kind === 'summary');
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.end();
  }
}

export class Programs implements AsyncDisposable {
  readonly #lab: Lab;
  readonly #device: string;
  readonly #companion: Program;
  readonly #echo: Program;
  readonly #stream: Program;
  #totalBytes = 0;

  constructor({ lab, device, companion, echo, stream, onSample }: Wanted) {
    this.#lab = lab;
    this.#device = device;
    const start = (command: Command, env = {}, onLine?: (line: Said) => void) =>
      new Program(lab.commandIn(device, command), env, onLine);
    const { url, caFile, token } = companion;
    this.#companion = start(
      [launcher, 'device', 'run', '--json', '--url', url, '--ca', caFile, '--radio', 'wlan0'],
      { VIPER_TOKEN: token },
    );
    const probe = (...argv: string[]): Command => ['mptcpize', 'run', process.execPath, probes, ...argv];
    this.#echo = start(probe('echo', '--protocol', 'tcp', '--to', echo));
    this.#stream = start(probe('stream', '--to', stream), {}, (line) => {
      if (line.kind !== 'sample') return;
      this.#totalBytes = Number(line.totalBytes);
      onSample(Number(line.bps));
    });
  }

  /** The companion has told the cloudlet of the device. */
  get isReporting(): boolean {
    return this.#companion.said.some(({ kind }) => kind === 'reported');
  }

  /** When the companion said that it had come into another LAN, in ms since the epoch, if later than that. */
  arrivedAfter(ms: number): number | undefined {
    const times = this.#companion.said.flatMap(({ kind, at }) =>
      kind === 'arrived' ? [Date.parse(String(at))] : [],
    );
    return times.find((time) => time > ms);
  }

  /** Resolves when more bytes of the stream have come. */
  async flows(): Promise<void> {
    const before = this.#totalBytes;
    const deadline = performance.now() + patienceMs;
    while (this.#totalBytes === before) {
      if (performance.now() > deadline) throw new Error('the stream stands still');
      await sleep(50);
    }
  }

  /** The shortest of five round trips in ms. */
  async ping(address: string): Promise<number> {
    const command = ['ping', '-n', '-q', '-c', '5', '-i', '0.2', '-W', '1', address] as const;
    const [file, ...args] = this.#lab.commandIn(this.#device, command);
    const { stdout } = await promisify(execFile)(file, args, { timeout: patienceMs }).catch((error) => error);
    return Number(/rtt min\/\S+ = ([\d.]+)\//.exec(stdout)?.[1] ?? Number.NaN);
  }

  /** Ends the connections; silences of the echo of 100 ms and more, and what became of the stream. */
  async end(): Promise<{ gaps: Gap[]; stream: StreamEnd }> {
    const echo = (await this.#echo.end()) as (Said & { gaps: Gap[] }) | undefined;
    const stream = (await this.#stream.end()) as unknown as StreamEnd | undefined;
    if (!echo || !stream) throw new Error('a probe of the device ended without a summary');
    return { gaps: echo.gaps, stream };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await Promise.all([this.#companion.end(), this.#echo.end(), this.#stream.end()]);
  }
}
