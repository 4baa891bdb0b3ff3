/**
 * What the source tells the destination of its division: the relays and the key, then where each slab is. Parsed
 * strictly, for it comes from another cloudlet.
 */
import type { Uuid } from '../../model/ids.ts';
import { isUuid } from '../../model/ids.ts';
import { keyBytes, maxSlabBytes } from '../../relay/index.ts';
import { agentError, batchPages, encodeFrame, encodeJson, frame } from '../condensed/frames.ts';
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
  /** Of VMs that leave together and share their slabs; see `Pool`. Missing where it shares with nobody. */
  pool?: Uuid;
  /** With this slabs are sealed; relays never see it. */
  key: Buffer;
  /** Whoever shows it to a relay may have the slabs. 32 bytes in hex. */
  group: string;
  /** Cloudlets, by their numbers in slabs. */
  relays: Uuid[];
  replicas: number;
  /** A part of a slab has so many pages, the last one perhaps fewer. */
  partPages: number;
}

export interface Slab {
  slab: number;
  /** Sealed bytes of each part, as they lie one behind the other. */
  parts: number[];
  /** Numbers of the relays that hold it. */
  holders: number[];
  /** Of a borrowed one: pages of the VM that has put it there. */
  runs: Run[];
  /** Another VM of the pool has put it there, and relays hold it for this one as well. */
  isBorrowed?: true;
}

export const mostRelays = 32;
/** As many as a layout has. */
export const mostPages = 2 ** 30;

export function encodeDivision(division: Division): Buffer {
  return encodeJson(frame.division, divisionJson(division));
}

export const divisionJson = ({ key, ...others }: Division) => ({ ...others, key: key.toString('hex') });

/** What the slabs are sealed for. */
export const sealedFor = ({ pool, migrationId }: Division): Uuid => pool ?? migrationId;

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
  const { migrationId, pool, key, group, relays, replicas, partPages } = value ?? {};
  const isHex = (text: unknown): text is string =>
    typeof text === 'string' && text.length === 2 * keyBytes && /^[0-9a-f]+$/.test(text);
  const areRelays =
    Array.isArray(relays) &&
    relays.length <= mostRelays &&
    relays.every((id) => typeof id === 'string' && isUuid(id));
  const isSound =
    typeof migrationId === 'string' && isUuid(migrationId) && isHex(key) && isHex(group) && areRelays;
  const isCount = (count: unknown, most: number): count is number =>
    Number.isInteger(count) && (count as number) >= 1 && (count as number) <= most;
  const isPool = pool === undefined || (typeof pool === 'string' && isUuid(pool));
  if (!isSound || !isPool || !isCount(replicas, mostRelays) || !isCount(partPages, batchPages))
    throw agentError('a division that is none');
  const ofPool = pool === undefined ? {} : { pool };
  return { migrationId, ...ofPool, key: Buffer.from(key, 'hex'), group, relays, replicas, partPages };
}

export function encodeSlab({ slab, parts, holders, runs, isBorrowed }: Slab): Buffer {
  const head = Buffer.alloc(5 + holders.length + 1);
  head.writeUInt32BE(slab);
  head[4] = holders.length;
  head.set(holders, 5);
  head[5 + holders.length] = parts.length;
  const sizes = Buffer.alloc(parts.length * mostNumberBytes);
  let at = 0;
  for (const bytes of parts) at = writeNumber(sizes, at, bytes);
  return encodeFrame(isBorrowed ? frame.borrowed : frame.slab, head, sizes.subarray(0, at), encodeRuns(runs));
}

export function parseSlab(body: Buffer, pages: number, { relays, partPages }: Division): Slab {
  const end = 5 + (body[4] ?? 0);
  if (body.length <= end) throw agentError('a slab without parts');
  const holders = [...body.subarray(5, end)];
  const areHolders = holders.length > 0 && new Set(holders).size === holders.length;
  if (!areHolders || holders.some((one) => one >= relays.length))
    throw agentError(`a slab that the relays ${holders.join(', ')} hold`);
  const slab = body.readUInt32BE(0);
  if (slab === 0) throw agentError('slab 0');
  const cursor: Cursor = { bytes: body, at: end + 1, end: body.length };
  const parts = Array.from({ length: body[end]! }, () => readNumber(cursor));
  const runs = parseRuns(body.subarray(cursor.at), pages);
  const count = runs.reduce((sum, run) => sum + run[1], 0);
  const isWhole = count > 0 && parts.length === Math.ceil(count / partPages) && !parts.includes(0);
  if (!isWhole || bytesOf(parts) > maxSlabBytes)
    throw agentError(`a slab of ${count} pages in ${parts.length} parts`);
  return { slab, parts, holders, runs };
}

/** Its pages are those of another VM, of which nothing is known. */
export const parseBorrowed = (body: Buffer, division: Division): Slab => ({
  ...parseSlab(body, mostPages, division),
  isBorrowed: true,
});

/** Where parts `first` to `last` lie in the slab. */
export const rangeOf = ({ parts }: Slab, first: number, last: number): { at: number; length: number } => ({
  at: bytesOf(parts.slice(0, first)),
  length: bytesOf(parts.slice(first, last + 1)),
});

export const bytesOf = (parts: readonly number[]): number => parts.reduce((sum, bytes) => sum + bytes, 0);

/** The number of the part that the page, which is in the slab, lies in. */
export function partOf({ runs }: Slab, page: number, partPages: number): number {
  let before = 0;
  for (const [first, count] of runs) {
    if (page >= first && page < first + count) return Math.floor((before + page - first) / partPages);
    before += count;
  }
  throw new Error(`Bug: page ${page} is not in the slab`);
}

export const encodeZeroes = (runs: readonly Run[]): Buffer => encodeFrame(frame.zeroes, encodeRuns(runs));

/** Pages that have the content which slabs have of others. */
export interface Alike {
  /** Of the same row as the numbers of slabs. */
  number: number;
  pages: AlikePage[];
}

export interface AlikePage {
  page: number;
  slab: number;
  /** The page in it, which in a borrowed slab is another VM's. */
  like: number;
}

export function encodeAlike({ number, pages }: Alike): Buffer {
  const bytes = Buffer.alloc(4 + pages.length * 3 * mostNumberBytes);
  bytes.writeUInt32BE(number);
  let at = 4;
  let before = 0;
  for (const { page, slab, like } of pages) {
    at = writeNumber(bytes, at, zigzag(page - before));
    at = writeNumber(bytes, at, slab);
    at = writeNumber(bytes, at, zigzag(like - page));
    before = page;
  }
  return encodeFrame(frame.alike, bytes.subarray(0, at));
}

export function parseAlike(body: Buffer, pages: number): Alike {
  if (body.length < 4) throw agentError('alike pages without a number');
  const cursor: Cursor = { bytes: body, at: 4, end: body.length };
  const found: AlikePage[] = [];
  let page = 0;
  while (cursor.at < cursor.end) {
    page += unzigzag(readNumber(cursor));
    const slab = readNumber(cursor);
    const like = page + unzigzag(readNumber(cursor));
    const isIn = (each: number, most: number) => each >= 0 && each < most;
    if (!isIn(page, pages) || !isIn(like, mostPages) || slab === 0)
      throw agentError(`page ${page} like ${like}`);
    found.push({ page, slab, like });
  }
  return { number: body.readUInt32BE(0), pages: found };
}

/** Of these pages no slab below this number is good. */
export interface Stale {
  slab: number;
  runs: Run[];
}

export function encodeStale({ slab, runs }: Stale): Buffer {
  const head = Buffer.alloc(4);
  head.writeUInt32BE(slab);
  return encodeFrame(frame.stale, head, encodeRuns(runs));
}

export function parseStale(body: Buffer, pages: number): Stale {
  if (body.length < 4) throw agentError('stale pages without a slab');
  return { slab: body.readUInt32BE(0), runs: parseRuns(body.subarray(4), pages) };
}

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
