/** Sentences with their time, and below them, on a terminal, one line that shows how things are now. */
import { styleText } from 'node:util';
import type { MigrationProgress } from '../src/sdk/node.ts';

interface Now {
  rttMs?: number | undefined;
  bps?: number;
  silentMs?: number;
  progress?: MigrationProgress | undefined;
}

const barWidth = 10;
const eraseLine = '\r\x1b[K';
/** Shorter silences are the ordinary ones of an echo every 10 ms on a busy machine. */
const silentFromMs = 100;

export class StatusLine {
  readonly #stream: NodeJS.WriteStream;
  readonly #began = performance.now();
  #now: Now = {};
  #isShown = false;

  constructor(stream: NodeJS.WriteStream) {
    this.#stream = stream;
  }

  say(text: string): void {
    const at = `${((performance.now() - this.#began) / 1000).toFixed(1)} s`.padStart(8);
    const wasShown = this.#isShown;
    this.clear();
    this.#stream.write(`${styleText('dim', at)}  ${text}\n`);
    if (wasShown) this.#show();
  }

  update(now: Now): void {
    this.#now = { ...this.#now, ...now };
    if (this.#stream.isTTY) this.#show();
  }

  clear(): void {
    if (this.#isShown) this.#stream.write(eraseLine);
    this.#isShown = false;
  }

  #show(): void {
    // A line that wraps could not be erased.
    this.#stream.write(eraseLine + lineOf(this.#now).slice(0, this.#stream.columns - 1));
    this.#isShown = true;
  }
}

export function lineOf({ rttMs, bps = 0, silentMs = 0, progress }: Now): string {
  const parts = [
    `RTT ${rttMs === undefined ? '   -' : rttMs.toFixed(1).padStart(4)} ms`,
    `${(bps / 1e6).toFixed(1)} Mbit/s`,
    `silent ${silentMs >= silentFromMs ? `${silentMs.toFixed(0)} ms` : '-'}`,
    ...(progress
      ? [`${progress.phase} ${barOf(progress.doneBytes / Math.max(1, progress.totalBytes))}`]
      : []),
  ];
  return `          ${parts.join('  ')}`;
}

function barOf(fraction: number): string {
  const full = Math.round(fraction * barWidth);
  return `${'█'.repeat(full)}${'░'.repeat(barWidth - full)} ${Math.round(fraction * 100)} %`;
}
