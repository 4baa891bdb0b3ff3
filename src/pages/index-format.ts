/** The index file of a reference set, byte by byte and without I/O: FORMAT.md. */
import { AppError } from '../model/errors.ts';
import { digestBytes, digestOf } from './blocks.ts';
import { isSetName, type SetName } from './reference-set.ts';

export const headerBytes = 4096;
export const recordBytes = digestBytes + 4;
export const recordsPerChunk = 2 ** 15;
const headerCheckAt = headerBytes - digestBytes;
const textAt = 64;
const maxTextBytes = 255;
const magic = Buffer.from('VIPERIDX');
const version = 1;
const blake3 = 1;

export interface IndexHeader {
  name: SetName;
  /** Which state of a file the set was read from; only compared. */
  stamp: string;
  records: number;
  blockCount: number;
  recordsDigest: Buffer;
}

export const fileBytesFor = (records: number): number => headerBytes + records * recordBytes;

export function encodeHeader(header: IndexHeader): Buffer {
  const name = Buffer.from(header.name);
  const stamp = Buffer.from(header.stamp);
  if (!isSetName(header.name) || stamp.length > maxTextBytes)
    throw new AppError('invalid_request', `Write index: name '${header.name}' or stamp '${header.stamp}'`, {
      problems: [{ field: 'name', value: header.name, wanted: 'a set name, a stamp of at most 255 bytes' }],
    });
  const bytes = Buffer.alloc(headerBytes);
  magic.copy(bytes);
  bytes.writeUInt32LE(version, 8);
  bytes.writeUInt32LE(blake3, 12);
  bytes.writeUInt32LE(header.records, 16);
  bytes.writeUInt32LE(header.blockCount, 20);
  bytes.writeUInt16LE(name.length, 24);
  bytes.writeUInt16LE(stamp.length, 26);
  header.recordsDigest.copy(bytes, 32);
  name.copy(bytes, textAt);
  stamp.copy(bytes, textAt + name.length);
  digestOf(bytes.subarray(0, headerCheckAt)).copy(bytes, headerCheckAt);
  return bytes;
}

/** `bytes` is the beginning of a file that has `sizeBytes` in all. Throws `image_corrupt`. */
export function decodeHeader(bytes: Buffer, sizeBytes: number): IndexHeader {
  if (bytes.length !== headerBytes) throw damaged(`it has ${sizeBytes} bytes`, 'a header of 4096');
  if (!magic.equals(bytes.subarray(0, 8))) throw damaged('it does not begin with VIPERIDX', 'an index');
  if (!digestOf(bytes.subarray(0, headerCheckAt)).equals(bytes.subarray(headerCheckAt)))
    throw damaged('the digest of its header is wrong', 'an undamaged header');
  if (bytes.readUInt32LE(8) !== version || bytes.readUInt32LE(12) !== blake3)
    throw damaged(`version ${bytes.readUInt32LE(8)}, digest ${bytes.readUInt32LE(12)}`, '1 and 1');
  const records = bytes.readUInt32LE(16);
  const blockCount = bytes.readUInt32LE(20);
  const nameBytes = bytes.readUInt16LE(24);
  const stampBytes = bytes.readUInt16LE(26);
  if (sizeBytes !== fileBytesFor(records))
    throw damaged(`${records} records in ${sizeBytes} bytes`, `${fileBytesFor(records)} bytes`);
  if (records > blockCount)
    throw damaged(`${records} records`, `at most one for each of ${blockCount} blocks`);
  if (nameBytes > maxTextBytes || stampBytes > maxTextBytes)
    throw damaged(`a name of ${nameBytes} and a stamp of ${stampBytes} bytes`, 'at most 255 each');
  const name = bytes.toString('utf8', textAt, textAt + nameBytes);
  if (!isSetName(name)) throw damaged(`its set is called '${name}'`, 'a set name');
  const stamp = bytes.toString('utf8', textAt + nameBytes, textAt + nameBytes + stampBytes);
  return { name, stamp, records, blockCount, recordsDigest: bytes.subarray(32, 64) };
}

export const damaged = (met: string, wanted: string): AppError =>
  new AppError('image_corrupt', `Read index: ${met}, wanted ${wanted}`);
