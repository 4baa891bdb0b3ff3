/** Links of a lab on the command line: their options, and how they are told. */
import { type Command, InvalidArgumentError } from 'commander';
import type { LabStatus } from '../lab/lab.ts';
import type { WireSettings } from '../lab/spec.ts';
import { formatBitRate, type Output } from './output.ts';
import { parseBitRate, parseDuration } from './values.ts';

export interface WireOptions {
  rtt?: number;
  rate?: number;
  loss?: number;
}

export const addWireOptions = (command: Command): Command =>
  command
    .option('--rtt <ms>', 'round-trip time', parseRtt)
    .option('--rate <rate>', 'Mbit/s, or with a unit: 1.5G; 0 is no limit', parseRate)
    .option('--loss <percent>', 'of the packets of each way', parsePercent);

export const wireOf = ({
  rtt,
  rate,
  loss,
}: { [K in keyof WireOptions]: WireOptions[K] | undefined }): Partial<WireSettings> => ({
  ...(rtt === undefined ? {} : { rttMs: rtt }),
  ...(rate === undefined ? {} : { rateBps: rate }),
  ...(loss === undefined ? {} : { lossPercent: loss }),
});

const isPlain = (text: string): boolean => /^\d{1,9}(\.\d{1,3})?$/.test(text);
/** Milliseconds: what round trips are told in; other units as everywhere. */
export const parseRtt = (text: string): number => (isPlain(text) ? Number(text) : parseDuration(text));
/** Megabits per second: what links are told in; other units as everywhere. */
export const parseRate = (text: string): number => (isPlain(text) ? Number(text) * 1e6 : parseBitRate(text));

function parsePercent(text: string): number {
  if (!isPlain(text) || Number(text) > 100) throw new InvalidArgumentError('Wanted 0 to 100.');
  return Number(text);
}

export function showStatus(output: Output, { cloudlets, links, devices }: LabStatus): void {
  output.table(
    ['CLOUDLET', 'LAN', 'URL'],
    cloudlets.map(({ name, lan, url }) => [name, lan, url]),
    '',
  );
  output.line('');
  output.table(
    ['LINK', 'IS'],
    links.map(({ places, ...settings }) => [places.join(' '), describeWire(settings)]),
    'no links',
  );
  if (devices.length > 0) output.line('');
  output.table(
    ['DEVICE', 'AT', 'ADDRESS', 'CELLULAR'],
    devices.map(({ name, at, address, cellularAddress }) => [
      name,
      at ?? 'on its way',
      address ?? '',
      cellularAddress ?? '',
    ]),
    '',
  );
}

export const describeWire = ({ rttMs, rateBps, lossPercent, isCut }: WireSettings): string =>
  [
    ...(isCut ? ['cut'] : []),
    `${rttMs} ms`,
    rateBps === 0 ? 'any rate' : formatBitRate(rateBps),
    ...(lossPercent === 0 ? [] : [`${lossPercent} % lost`]),
  ].join(', ');
