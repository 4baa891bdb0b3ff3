/**
 * What the two agents of a disk say to each other over a disk session, beside the batches that memory has, too. A
 * block of 4 KiB is to a disk what a page is to memory. FORMAT.md is the page of it.
 */
import { isSetName, type SetName } from '../../pages/index.ts';
import { agentError, encodeFrame, frame, protocolVersion } from './frames.ts';

/** The set that both have without a name of its own: what was mirrored in this migration. It comes last. */
export const mirroredSet: SetName = 'mirrored:disk';

export interface DiskOffer {
  version: number;
  /** Of the disk at the destination. */
  sizeBytes: number;
  sets: SetName[];
}

export interface DiskHello {
  version: number;
  sets: SetName[];
}

const maxSets = 32;
/** The most that one frame of bytes carries: what does not fill a block. */
export const maxRaggedBytes = 4096;

export function parseDiskOffer(body: Buffer): DiskOffer {
  const { version, sizeBytes, sets } = parse(body);
  if (!Number.isSafeInteger(sizeBytes) || (sizeBytes as number) < 0)
    throw agentError(`a disk of ${sizeBytes} bytes`);
  return { version, sizeBytes: sizeBytes as number, sets };
}

export function parseDiskHello(body: Buffer): DiskHello {
  const { version, sets } = parse(body);
  return { version, sets };
}

function parse(body: Buffer): Record<string, unknown> & DiskHello {
  let value: unknown;
  try {
    value = JSON.parse(body.toString('utf8'));
  } catch {
    throw agentError('what is no JSON');
  }
  const { version, sets } = (value ?? {}) as Record<string, unknown>;
  if (version !== protocolVersion) throw agentError('the first word of another version');
  const isList = Array.isArray(sets) && sets.length <= maxSets;
  if (!isList || !sets.every((name) => typeof name === 'string' && isSetName(name)))
    throw agentError('names of sets that are none');
  return { ...(value as object), version, sets };
}

/** Bytes that do not fill a block. */
export function encodeRagged(offset: number, bytes: Buffer): Buffer {
  const head = Buffer.alloc(8);
  head.writeBigUInt64BE(BigInt(offset));
  return encodeFrame(frame.diskBytes, head, bytes);
}

export function parseRagged(body: Buffer, sizeBytes: number): { offset: number; bytes: Buffer } {
  const bytes = body.subarray(8);
  if (bytes.length === 0 || bytes.length > maxRaggedBytes) throw agentError(`${bytes.length} ragged bytes`);
  return { offset: place(body, bytes.length, sizeBytes), bytes };
}

/** `mayUnmap`: a hole will do. */
export function encodeZeroes(offset: number, lengthBytes: number, isTrim: boolean): Buffer {
  const body = Buffer.alloc(17);
  body.writeBigUInt64BE(BigInt(offset), 0);
  body.writeBigUInt64BE(BigInt(lengthBytes), 8);
  body[16] = Number(isTrim);
  return encodeFrame(frame.diskZeroes, body);
}

export function parseZeroes(
  body: Buffer,
  sizeBytes: number,
): { offset: number; lengthBytes: number; isTrim: boolean } {
  if (body.length !== 17) throw agentError(`zeroes in ${body.length} bytes`);
  const lengthBytes = Number(body.readBigUInt64BE(8));
  return { offset: place(body, lengthBytes, sizeBytes), lengthBytes, isTrim: body[16] === 1 };
}

/** Numbers one after the other: of a flush, or of a batch and of the blocks that could not be made out of it. */
export const encodeNumbers = (type: number, numbers: readonly number[]): Buffer => {
  const body = Buffer.alloc(numbers.length * 4);
  numbers.forEach((number, i) => {
    body.writeUInt32BE(number, i * 4);
  });
  return encodeFrame(type, body);
};

export function parseNumbers(body: Buffer): [number, ...number[]] {
  if (body.length < 4 || body.length % 4 !== 0) throw agentError(`numbers in ${body.length} bytes`);
  return Array.from({ length: body.length / 4 }, (_, i) => body.readUInt32BE(i * 4)) as [number, ...number[]];
}

function place(body: Buffer, lengthBytes: number, sizeBytes: number): number {
  const offset = Number(body.readBigUInt64BE(0));
  if (offset + lengthBytes > sizeBytes)
    throw agentError(`${lengthBytes} bytes at ${offset} of a disk of ${sizeBytes}`);
  return offset;
}
