/** Numbers of page runs on the wire: unsigned LEB128, and differences as zigzag. */
import { agentError } from './frames.ts';

/** The most bytes of one. */
export const mostNumberBytes = 6;

/** Gives where the next one goes. */
export function writeNumber(to: Buffer, at: number, value: number): number {
  let end = at;
  let left = value;
  while (left >= 128) {
    to[end++] = (left % 128) + 128;
    left = Math.floor(left / 128);
  }
  to[end++] = left;
  return end;
}

export interface Cursor {
  bytes: Buffer;
  at: number;
  end: number;
}

/** Throws for one that does not end. */
export function readNumber(cursor: Cursor): number {
  let value = 0;
  for (let factor = 1; factor < 2 ** 40; factor *= 128) {
    if (cursor.at >= cursor.end) break;
    const byte = cursor.bytes[cursor.at++]!;
    value += (byte & 127) * factor;
    if (byte < 128) return value;
  }
  throw agentError('a number without an end');
}

export const zigzag = (value: number): number => (value < 0 ? -2 * value - 1 : 2 * value);
export const unzigzag = (value: number): number => (value % 2 === 1 ? -(value + 1) / 2 : value / 2);
