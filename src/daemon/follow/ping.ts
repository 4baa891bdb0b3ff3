/** Round trips to devices by `ping` (iputils), whose arguments are addresses that were checked to be some. */
import { type ChildProcess, spawn } from 'node:child_process';
import { isIP } from 'node:net';
import { createInterface } from 'node:readline';

const environment = { PATH: process.env.PATH ?? '/usr/sbin:/usr/bin:/sbin:/bin', LC_ALL: 'C' };
/** The least that older pings allow to everyone. */
const shortestIntervalMs = 200;
/** Between the few probes of a question that somebody waits for. */
const briefIntervalMs = 50;
const restartMs = 1000;

/** What one line of its output says: a round trip in ms, a probe that was lost, or nothing. */
export function parsePingLine(line: string): number | 'lost' | undefined {
  const time = /^\d+ bytes from .* time=(\d{1,7}(?:\.\d{1,3})?) ms$/.exec(line)?.[1];
  if (time !== undefined) return Number(time);
  return /^no answer yet for icmp_seq=|^From .*Unreachable$/.test(line) ? 'lost' : undefined;
}

/** Whether it may be pinged: one host, neither a group nor everybody. */
export function isHostAddress(address: string): boolean {
  if (isIP(address) === 4) {
    const first = Number(address.split('.')[0]);
    return first > 0 && first < 224;
  }
  return isIP(address) === 6 && !/^ff/i.test(address) && address !== '::' && !address.includes('%');
}

/**
 * The shortest round trip of a few probes, in ms; undefined if none came back before the signal aborts, or ping does
 * not run here. It answers at the second one, so that the first may have waited for ARP.
 */
export function pingBriefly(address: string, signal: AbortSignal): Promise<number | undefined> {
  if (!isHostAddress(address) || signal.aborted) return Promise.resolve(undefined);
  return new Promise((resolve) => {
    const child = start(['-c', '3', ...pace(briefIntervalMs), address]);
    const answers: number[] = [];
    const end = () => {
      signal.removeEventListener('abort', end);
      child.kill('SIGKILL');
      resolve(answers.length > 0 ? Math.min(...answers) : undefined);
    };
    signal.addEventListener('abort', end);
    child.once('error', end);
    child.once('close', end);
    linesOf(child, (line) => {
      const found = parsePingLine(line);
      if (typeof found !== 'number') return;
      answers.push(found);
      if (answers.length === 2) end();
    });
  });
}

/** Pings one address until it is disposed of; a ping that ends (no route, say) counts as lost and is started again. */
export class PingWatch implements Disposable {
  readonly #address: string;
  readonly #everyMs: number;
  readonly #onSample: (sample: number | 'lost') => void;
  #child: ChildProcess | undefined;
  #restart: NodeJS.Timeout | undefined;
  #disposed = false;

  constructor(address: string, everyMs: number, onSample: (sample: number | 'lost') => void) {
    this.#address = address;
    this.#everyMs = Math.max(shortestIntervalMs, everyMs);
    this.#onSample = onSample;
    if (isHostAddress(address)) this.#start();
  }

  #start(): void {
    const child = start([...pace(this.#everyMs), this.#address]);
    this.#child = child;
    let ended = false;
    const onEnd = () => {
      if (ended || this.#disposed) return;
      ended = true;
      this.#onSample('lost');
      this.#restart = setTimeout(() => this.#start(), restartMs);
      this.#restart.unref();
    };
    child.once('error', onEnd);
    child.once('close', onEnd);
    linesOf(child, (line) => {
      const sample = this.#disposed ? undefined : parsePingLine(line);
      if (sample !== undefined) this.#onSample(sample);
    });
  }

  [Symbol.dispose](): void {
    this.#disposed = true;
    clearTimeout(this.#restart);
    this.#child?.kill('SIGKILL');
  }
}

const pace = (everyMs: number): string[] => ['-n', '-O', '-W', '1', '-i', String(everyMs / 1000)];

const start = (args: string[]): ChildProcess =>
  spawn('ping', args, { stdio: ['ignore', 'pipe', 'ignore'], env: environment });

function linesOf(child: ChildProcess, onLine: (line: string) => void): void {
  if (child.stdout) createInterface({ input: child.stdout }).on('line', onLine);
}
