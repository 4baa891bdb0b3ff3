/** The tail of a pre-copy, which has no lengths: what of it is devices, and what only describes them. */
import { section } from './layout.ts';
import { streamRefused } from './refusal.ts';

/**
 * The device sections of a complete tail, without EOF and the description behind them. The description is found from
 * the end: EOF, its kind, a length that reaches to the very end, and JSON of that length.
 * Throws `qemu_failed` when it is not there.
 */
export function devicesOf(tail: Buffer): Buffer {
  const mark = Buffer.of(section.eof, section.description);
  let at = tail.lastIndexOf(mark);
  while (at >= 0) {
    const json = at + 6;
    if (json <= tail.length && tail.readUInt32BE(at + 2) === tail.length - json && isJson(tail, json))
      return tail.subarray(0, at);
    at = at === 0 ? -1 : tail.lastIndexOf(mark, at - 1);
  }
  throw streamRefused('truncated', `no description of the devices in a tail of ${tail.length} bytes`);
}

function isJson(tail: Buffer, from: number): boolean {
  try {
    JSON.parse(tail.toString('utf8', from));
    return true;
  } catch {
    return false;
  }
}
