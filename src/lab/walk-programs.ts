/**
 * What runs on the device of a walk: the companion that reports where it is, an echo every 10 ms and a stream whose
 * every byte is checked, each over one connection; and pings.
 */
import { type ChildProcess, execFile, spawn } from 'node:child_process';
import { once } from 'node:events';
import { readFile } from 'node:fs/promises';
import path from 'node:path';
import { createInterface } from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';
import { promisify } from 'node:util';
import type { Command } from '../network/index.ts';
import type { Lab } from './lab.ts';
import type { EchoSample } from './probes/echo.ts';
import type { StreamSample } from './probes/stream.ts';

const launcher = path.resolve(import.meta.dirname, '../../bin/viper');
const probes = path.resolve(import.meta.dirname, 'probes/main.ts');
const patienceMs = 120_000;
const sampleEveryMs = 250;
const pingEveryMs = 10;

interface Said {
  kind: string;
  [fact: string]: unknown;
}

export interface StreamEnd {
  verifiedBytes: number;
  brokenBy?: string;
}

export interface WalkProgramsOptions {
  lab: Lab;
  device: string;
  companion: { url: string; caFile: string; token: string };
  /** HOST:PORT of the VM's servers. */
  echo: string;
  stream: string;
  /** `mptcp`: the connections are MPTCP's. `tcp`: plain ones, of this address of the device. */
  over: { protocol: 'mptcp' } | { protocol: 'tcp'; from: string };
  onEcho?: (sample: EchoSample) => void;
  onStream?: (sample: StreamSample) => void;
}

/** A program of the device and what it has said so far, a JSON document a line. */
class Program implements AsyncDisposable {
  readonly said: Said[] = [];
  readonly #child: ChildProcess;

  constructor(
    [file, ...args]: Command,
    env: Record<string, string>,
    onSample: (line: Said) => void = () => {},
  ) {
    const child = spawn(file, args, { stdio: ['ignore', 'pipe', 'ignore'], env: { ...process.env, ...env } });
    this.#child = child;
    createInterface({ input: child.stdout! }).on('line', (text) => {
      const line = JSON.parse(text) as Said;
      if (line.kind === 'sample') onSample(line);
      else this.said.push(line);
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

export class WalkPrograms implements AsyncDisposable {
  readonly #lab: Lab;
  readonly #device: string;
  readonly #companion: Program;
  readonly #echo: Program;
  readonly #stream: Program;
  readonly #answers: string;
  #totalBytes = 0;

  constructor({ lab, device, companion, echo, stream, over, onEcho, onStream }: WalkProgramsOptions) {
    this.#lab = lab;
    this.#device = device;
    this.#answers = path.join(lab.directory, 'echo.csv');
    const start = (command: Command, env = {}, onSample?: (line: Said) => void) =>
      new Program(lab.commandIn(device, command), env, onSample);
    const { url, caFile, token } = companion;
    const isMptcp = over.protocol === 'mptcp';
    const about = ['--url', url, '--ca', caFile, '--radio', 'wlan0', ...(isMptcp ? [] : ['--no-mptcp'])];
    this.#companion = start([launcher, 'device', 'run', '--json', ...about], { VIPER_TOKEN: token });
    const probe = (...argv: string[]): Command => {
      const program: Command = [process.execPath, probes, ...argv, '--every', String(sampleEveryMs)];
      return isMptcp ? ['mptcpize', 'run', ...program] : [...program, '--from', over.from];
    };
    this.#echo = start(probe('echo', '--protocol', 'tcp', '--to', echo, '--csv', this.#answers), {}, (line) =>
      onEcho?.(line as unknown as EchoSample),
    );
    this.#stream = start(probe('stream', '--to', stream), {}, (line) => {
      const sample = line as unknown as StreamSample;
      this.#totalBytes = sample.totalBytes;
      onStream?.(sample);
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
  async flows(signal: AbortSignal): Promise<void> {
    const before = this.#totalBytes;
    const deadline = performance.now() + patienceMs;
    while (this.#totalBytes === before) {
      if (performance.now() > deadline) throw new Error('the stream stands still');
      await sleep(50, undefined, { signal });
    }
  }

  /** The shortest of five round trips in ms. */
  async ping(address: string): Promise<number> {
    const command = ['ping', '-n', '-q', '-c', '5', '-i', '0.2', '-W', '1', address] as const;
    const [file, ...args] = this.#lab.commandIn(this.#device, command);
    const { stdout } = await promisify(execFile)(file, args, { timeout: patienceMs }).catch((error) => error);
    return Number(/rtt min\/\S+ = ([\d.]+)\//.exec(stdout)?.[1] ?? Number.NaN);
  }

  /** Pings an address every 10 ms; ended, it gives when answers came, in ms since the epoch. */
  pingAlong(address: string): { end(): Promise<number[]> } {
    const command = ['ping', '-n', '-D', '-i', String(pingEveryMs / 1000), address] as const;
    const [file, ...args] = this.#lab.commandIn(this.#device, command);
    const child = spawn(file, args, { stdio: ['ignore', 'pipe', 'ignore'] });
    const answers: number[] = [];
    createInterface({ input: child.stdout }).on('line', (line) => {
      const [, seconds] = /^\[([\d.]+)\] \d+ bytes from/.exec(line) ?? [];
      if (seconds !== undefined) answers.push(Number(seconds) * 1000);
    });
    return {
      async end() {
        child.kill('SIGINT');
        if (child.exitCode === null && child.signalCode === null) await once(child, 'close');
        return answers;
      },
    };
  }

  /** When the echo's answers came, in ms since the epoch. */
  async answers(): Promise<number[]> {
    const [, ...rows] = (await readFile(this.#answers, 'utf8')).trim().split('\n');
    return rows.map((row) => Number(row.split(',')[2]));
  }

  /** Ends the connections, and tells what became of the stream. */
  async end(): Promise<StreamEnd> {
    const [echo, stream] = await Promise.all([this.#echo.end(), this.#stream.end()]);
    if (!echo || !stream) throw new Error('a probe of the device ended without a summary');
    const { verifiedBytes, brokenBy } = stream as unknown as StreamEnd;
    const broken = brokenBy ?? (echo.brokenBy as string | undefined);
    return { verifiedBytes, ...(broken === undefined ? {} : { brokenBy: broken }) };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await Promise.all([this.#companion.end(), this.#echo.end(), this.#stream.end()]);
  }
}
