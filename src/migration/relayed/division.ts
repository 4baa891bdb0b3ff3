/**
 * What the source tells the destination of its division: the relays and the key, then where each slab is. Parsed
 * strictly, for it comes from another cloudlet.
 */
import type { Uuid } from '../../model/ids.ts';
import { isUuid } from '../../model/ids.ts';
import { keyBytes } from '../../relay/index.ts';
import { agentError, encodeFrame, encodeJson, frame } from '../condensed/frames.ts';
import {
  type Cursor,
  mostNumberBytes,
  readNumber,
  unzigzag,
  writeNumber,
  zigzag,
} from '../condensed/numbers.ts';

/** Consecutive pages: the first, and how many. */
export type Run = readonly [number, number];

export interface Division {
  migrationId: Uuid;
  /** With this slabs are sealed; relays never see it. */
  key: Buffer;
  /** Whoever shows it to a relay may have the slabs. 32 bytes in hex. */
  group: string;
  /** Cloudlets, by their numbers in slabs. */
  relays: Uuid[];
  replicas: number;
}

export interface Slab {
  slab: number;
  sealedBytes: number;
  /** Numbers of the relays that hold it. */
  holders: number[];
  runs: Run[];
}

export const mostRelays = 32;

export function encodeDivision(division: Division): Buffer {
  return encodeJson(frame.division, divisionJson(division));
}

export const divisionJson = ({ key, ...others }: Division) => ({ ...others, key: key.toString('hex') });

export function parseDivision(body: Buffer): Division {
  let value: Record<string, unknown>;
  try {
    value = JSON.parse(body.toString('utf8'));
  } catch {
    throw agentError('a division that is no JSON');
  }
  return divisionOf(value);
}

/** From what JSON gave. Throws for anything else. */
export function divisionOf(value: Record<string, unknown>): Division {
  const { migrationId, key, group, relays, replicas } = value ?? {};
  const isHex = (text: unknown): text is string =>
    typeof text === 'string' && text.length === 2 * keyBytes && /^[0-9a-f]+$/.test(text);
  const areRelays =
    Array.isArray(relays) &&
    relays.length <= mostRelays &&
    relays.every((id) => typeof id === 'string' && isUuid(id));
  const isSound =
    typeof migrationId === 'string' && isUuid(migrationId) && isHex(key) && isHex(group) && areRelays;
  if (!isSound || !Number.isInteger(replicas) || (replicas as number) < 1)
    throw agentError('a division that is none');
  return { migrationId, key: Buffer.from(key, 'hex'), group, relays, replicas: replicas as number };
}

export function encodeSlab({ slab, sealedBytes, holders, runs }: Slab): Buffer {
  const head = Buffer.alloc(9);
  head.writeUInt32BE(slab);
  head.writeUInt32BE(sealedBytes, 4);
  head[8] = holders.length;
  return encodeFrame(frame.slab, head, Buffer.from(holders), encodeRuns(runs));
}

export function parseSlab(body: Buffer, pages: number, relays: number): Slab {
  const end = 9 + (body[8] ?? 0);
  if (body.length <= end) throw agentError('a slab without pages');
  const holders = [...body.subarray(9, end)];
  if (
    holders.length === 0 ||
    new Set(holders).size !== holders.length ||
    holders.some((one) => one >= relays)
  )
    throw agentError(`a slab that the relays ${holders.join(', ')} hold`);
  const slab = body.readUInt32BE(0);
  if (slab === 0) throw agentError('slab 0');
  return { slab, sealedBytes: body.readUInt32BE(4), holders, runs: parseRuns(body.subarray(end), pages) };
}

export const encodeZeroes = (runs: readonly Run[]): Buffer => encodeFrame(frame.zeroes, encodeRuns(runs));

/** Runs as zigzag(first page - end of the run before) and count. */
function encodeRuns(runs: readonly Run[]): Buffer {
  const bytes = Buffer.alloc(runs.length * 2 * mostNumberBytes);
  let at = 0;
  let next = 0;
  for (const [first, count] of runs) {
    at = writeNumber(bytes, at, zigzag(first - next));
    at = writeNumber(bytes, at, count);
    next = first + count;
  }
  return bytes.subarray(0, at);
}

export function parseRuns(bytes: Buffer, pages: number): Run[] {
  const cursor: Cursor = { bytes, at: 0, end: bytes.length };
  const runs: Run[] = [];
  let next = 0;
  while (cursor.at < cursor.end) {
    const first = next + unzigzag(readNumber(cursor));
    const count = readNumber(cursor);
    next = first + count;
    if (first < 0 || count < 1 || next > pages) throw agentError(`a run of ${count} pages from ${first}`);
    runs.push([first, count]);
  }
  return runs;
}
