/** What is measured: links, load in the guest, and who moves it. Parsed once from the command line. */
import { parseArgs } from 'node:util';
import { AppError } from '../../model/errors.ts';

export const rates = [350, 175, 60] as const;
export const rtts = [20, 50, 100, 150] as const;
const corners = { rates: [350, 60], rtts: [20, 150] };

/** Stock QEMU first, which the others are compared with. */
export const movers = ['precopy', 'multifd', 'postcopy', 'direct', 'condensed'] as const;
export type Mover = (typeof movers)[number];
export const isStock = (mover: Mover): mover is 'precopy' | 'multifd' | 'postcopy' =>
  mover !== 'direct' && mover !== 'condensed';

export const moverNames: Record<Mover, string> = {
  precopy: 'QEMU pre-copy, default parameters',
  multifd: 'QEMU multifd + zstd',
  postcopy: 'QEMU post-copy',
  direct: 'Viper direct',
  condensed: 'Viper condensed',
};

export interface Cell {
  rateMbps: number;
  rttMs: number;
  /** MB/s that the guest rewrites meanwhile; 0 for an idle one. */
  writerMBps: number;
  /**
   * What the destination has before: the base image alone, the golden snapshot too, or what stayed behind when the VM
   * left it a minute ago.
   */
  holds: Holds;
}
const holdings = ['image', 'golden', 'stayed'] as const;
export type Holds = (typeof holdings)[number];

export interface Wanted {
  cells: Cell[];
  movers: Mover[];
  rounds: number;
  /** A migration that has not ended by then never does. */
  boundMs: number;
  mode: 'precopy' | 'hybrid' | 'auto';
  /** Instead of the grid: a VM with a large disk of its own, over the first cell's link. */
  overlay: boolean;
  /** Measures nothing: makes the report from what was measured before. */
  reportOnly: boolean;
  /** Forgets what was measured before. */
  fresh: boolean;
  /** The report becomes the page in `docs`. */
  toDocs: boolean;
}

export function parseWanted(argv: readonly string[]): Wanted {
  const { values } = parseArgs({
    args: [...argv],
    options: {
      full: { type: 'boolean', default: false },
      rates: { type: 'string' },
      rtts: { type: 'string' },
      cells: { type: 'string' },
      writers: { type: 'string', default: '0,8,32' },
      movers: { type: 'string', default: movers.join() },
      holds: { type: 'string', default: 'image' },
      rounds: { type: 'string', default: '1' },
      bound: { type: 'string', default: '180' },
      mode: { type: 'string', default: 'auto' },
      overlay: { type: 'boolean', default: false },
      report: { type: 'boolean', default: false },
      fresh: { type: 'boolean', default: false },
      docs: { type: 'boolean', default: false },
    },
  });
  const full = values.full ? { rates, rtts } : corners;
  const all = <T extends string>(option: string, text: string, known: readonly T[]): T[] =>
    text.split(',').map((each) => {
      const found = known.find((one) => one === each);
      if (found === undefined) throw refusal(option, each, `some of ${known.join(',')}`);
      return found;
    });
  const numbers = (option: string, text: string | undefined, otherwise: readonly number[]): number[] => {
    if (text === undefined) return [...otherwise];
    return text.split(',').map((each) => {
      const value = Number(each);
      if (each !== '' && value >= 0 && value <= 10_000) return value;
      throw refusal(option, each, 'numbers from 0 to 10000');
    });
  };
  const cells: Cell[] = (values.cells?.split(',') ?? []).map((text) => {
    const [rateMbps = 0, rttMs = 0, writerMBps = 0] = text.split('/').slice(0, 3).map(Number);
    const held = text.split('/')[3] ?? 'image';
    const holds = all('cells', held, holdings)[0]!;
    const isWhole = text.split('/').length >= 3;
    if (isWhole && rateMbps > 0 && rttMs >= 0 && writerMBps >= 0)
      return { rateMbps, rttMs, writerMBps, holds };
    throw refusal('cells', text, 'RATE/RTT/WRITER or RATE/RTT/WRITER/HOLDS');
  });
  if (values.cells !== undefined) return wantedOf(cells);
  for (const rateMbps of numbers('rates', values.rates, full.rates))
    for (const rttMs of numbers('rtts', values.rtts, full.rtts))
      for (const writerMBps of numbers('writers', values.writers, []))
        for (const holds of all('holds', values.holds, holdings))
          cells.push({ rateMbps, rttMs, writerMBps, holds });
  return wantedOf(cells);

  function wantedOf(cells: Cell[]): Wanted {
    return {
      cells,
      movers: all('movers', values.movers, movers),
      rounds: numbers('rounds', values.rounds, [])[0]!,
      boundMs: numbers('bound', values.bound, [])[0]! * 1000,
      mode: all('mode', values.mode, ['precopy', 'hybrid', 'auto'] as const)[0]!,
      overlay: values.overlay,
      reportOnly: values.report,
      fresh: values.fresh,
      toDocs: values.docs,
    };
  }
}

const refusal = (option: string, value: string, wanted: string): AppError =>
  new AppError('invalid_request', `bench:wan: --${option} has '${value}', wanted ${wanted}`, {
    problems: [{ field: option, value, wanted }],
  });
