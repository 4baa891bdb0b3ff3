/** Values of options, from what people type. Each refusal says what was wanted; commander names option and value. */
import { readFileSync } from 'node:fs';
import { InvalidArgumentError } from 'commander';
import { UsageError } from './failures.ts';

const sizeUnits = { '': 0, K: 1, M: 2, G: 3, T: 4 } as const;

/** Bytes of `512M`, `4G`, `1.5GiB` or `1048576`; the units are powers of 1024. */
export function parseSize(text: string): number {
  const [, number = '', unit = ''] = /^(\d{1,15}(?:\.\d{1,6})?)(?:([KMGT])(?:iB)?|B)?$/.exec(text) ?? [];
  const bytes = Number(number) * 1024 ** sizeUnits[unit as keyof typeof sizeUnits];
  if (number === '' || !Number.isSafeInteger(bytes)) {
    throw new InvalidArgumentError('Wanted a size such as 512M, 4G or 1GiB (units of 1024).');
  }
  return bytes;
}

const rateUnits = { '': 1, K: 1e3, M: 1e6, G: 1e9 } as const;

/** Bits per second of `100M`, `1.5G` or `2000000`; the units are powers of 1000, as networks count. */
export function parseBitRate(text: string): number {
  const [, number = '', unit = ''] = /^(\d{1,15}(?:\.\d{1,6})?)([KMG])?$/.exec(text) ?? [];
  const bps = Number(number) * rateUnits[unit as keyof typeof rateUnits];
  if (number === '' || !Number.isSafeInteger(bps)) {
    throw new InvalidArgumentError('Wanted bits per second such as 100M or 1.5G (units of 1000).');
  }
  return bps;
}

const durationUnits: Record<string, number> = { ms: 1, s: 1000, m: 60_000, h: 3_600_000, d: 86_400_000 };

/** Milliseconds of `500ms`, `30s`, `5m`, `2h` or `30d`. */
export function parseDuration(text: string): number {
  const [, number = '', unit = ''] = /^(\d{1,9}(?:\.\d{1,3})?)(ms|s|m|h|d)$/.exec(text) ?? [];
  const ms = Number(number) * (durationUnits[unit] ?? Number.NaN);
  if (!Number.isFinite(ms)) {
    throw new InvalidArgumentError('Wanted a time with its unit, such as 30s, 5m, 2h or 30d.');
  }
  return Math.round(ms);
}

/** Seconds of a duration, for what the API counts in seconds. */
export function parseSeconds(text: string): number {
  const seconds = parseDuration(text) / 1000;
  if (!Number.isInteger(seconds) || seconds < 1) {
    throw new InvalidArgumentError('Wanted whole seconds, at least 1s; such as 30s, 2h or 30d.');
  }
  return seconds;
}

export function parseCount(text: string): number {
  if (!/^\d{1,9}$/.test(text)) throw new InvalidArgumentError('Wanted a whole number.');
  return Number(text);
}

/** A rate in bits per second, or the word that there is none. */
export const rateOrNone = (text: string): number | 'none' => (text === 'none' ? text : parseBitRate(text));

/** For options that may be given several times. */
export const collect = (value: string, before: string[] = []): string[] => [...before, value];

/** The text of a file; `-` is standard input. */
export function readText(file: string, option: string): string {
  try {
    return readFileSync(file === '-' ? 0 : file, 'utf8');
  } catch (error) {
    const reason = error instanceof Error ? error.message : String(error);
    throw new UsageError(`Cannot read '${file}', which ${option} names: ${reason}`);
  }
}
