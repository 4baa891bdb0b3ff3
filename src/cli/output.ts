/** What commands print: one JSON document, or tables and facts for people. Results go to stdout, the rest to stderr. */
import { styleText } from 'node:util';
import Table from 'cli-table3';

export interface OutputOptions {
  json?: boolean;
  quiet?: boolean;
}

export interface Output {
  readonly json: boolean;
  readonly quiet: boolean;
  /** The API's JSON as it is with --json, else what `forPeople` prints. */
  show(value: unknown, forPeople: () => void): void;
  /** A line of result. */
  line(text: string): void;
  /** Columns that line up; `empty` is said instead of a table without rows. */
  table(headers: string[], rows: string[][], empty: string): void;
  /** One fact a line; those without a value are left out. */
  facts(facts: [name: string, value: string | undefined][]): void;
  /** A sentence about what was done: not with --json or --quiet. */
  say(text: string): void;
  /** A note beside the result, on stderr: not with --quiet. */
  note(text: string): void;
}

const none = '';
const plain = {
  top: none,
  'top-mid': none,
  'top-left': none,
  'top-right': none,
  bottom: none,
  'bottom-mid': none,
  'bottom-left': none,
  'bottom-right': none,
  left: none,
  'left-mid': none,
  mid: none,
  'mid-mid': none,
  right: none,
  'right-mid': none,
  middle: '  ',
};

export function createOutput({ json = false, quiet = false }: OutputOptions): Output {
  const line = (text: string) => void process.stdout.write(`${text}\n`);
  const note = (text: string) => {
    if (!quiet) process.stderr.write(`${text}\n`);
  };
  const print = (rows: string[][]) => {
    const table = new Table({
      chars: plain,
      style: { head: [], border: [], 'padding-left': 0, 'padding-right': 0 },
    });
    table.push(...rows);
    for (const row of table.toString().split('\n')) line(row.trimEnd());
  };
  return {
    json,
    quiet,
    line,
    note,
    show: (value, forPeople) => (json ? line(JSON.stringify(value, null, 2)) : forPeople()),
    table: (headers, rows, empty) => (rows.length > 0 ? print([headers, ...rows]) : note(empty)),
    facts: (facts) =>
      print(
        facts.flatMap(([name, value]) => (value === undefined || value === '' ? [] : [[`${name}:`, value]])),
      ),
    say: (text) => {
      if (!json && !quiet) line(text);
    },
  };
}

const stateColours = {
  running: 'green',
  succeeded: 'green',
  paused: 'yellow',
  creating: 'cyan',
  starting: 'cyan',
  stopping: 'cyan',
  deleting: 'cyan',
  migrating: 'cyan',
  arriving: 'cyan',
  crashed: 'red',
  failed: 'red',
} as const;

/** A state in its colour, if stdout is a terminal that wants colours (NO_COLOR). */
export function paintState(state: string): string {
  const colour = stateColours[state as keyof typeof stateColours];
  return colour ? styleText(colour, state, { stream: process.stdout }) : state;
}

/** `85 ms`, `12 s`, `3 min 20 s`: for people only. */
export function formatDuration(ms: number): string {
  if (ms < 1000) return `${Math.round(ms)} ms`;
  if (ms < 10_000) return `${Number((ms / 1000).toFixed(1))} s`;
  const seconds = Math.round(ms / 1000);
  if (seconds < 60) return `${seconds} s`;
  const minutes = Math.floor(seconds / 60);
  return minutes < 60
    ? `${minutes} min ${seconds % 60} s`
    : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

/** `940 Mbit/s`: bits, and units of 1000, as networks count. */
export function formatBitRate(bps: number): string {
  const units = ['bit/s', 'kbit/s', 'Mbit/s', 'Gbit/s'];
  let value = bps;
  let unit = 0;
  for (; value >= 1000 && unit < units.length - 1; unit += 1) value /= 1000;
  return `${Number(value.toFixed(value < 10 ? 1 : 0))} ${units[unit]}`;
}

/** How long ago: `12s`, `5m`, `3h`, `40d`. */
export function formatAge(iso: string, now = Date.now()): string {
  const seconds = Math.max(0, Math.floor((now - Date.parse(iso)) / 1000));
  if (!Number.isFinite(seconds)) return '?';
  if (seconds < 120) return `${seconds}s`;
  if (seconds < 2 * 3600) return `${Math.floor(seconds / 60)}m`;
  if (seconds < 2 * 86_400) return `${Math.floor(seconds / 3600)}h`;
  return `${Math.floor(seconds / 86_400)}d`;
}

/** A moment for people, in UTC: `2026-11-20 17:03:09`. */
export const formatTime = (iso: string | undefined): string | undefined =>
  iso?.slice(0, 19).replace('T', ' ');

/** Enough of a digest to tell images apart. */
export const shortDigest = (digest: string): string => digest.slice(0, 'sha256:'.length + 12);
