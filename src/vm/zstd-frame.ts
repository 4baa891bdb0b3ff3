/**
 * How long the zstd frame at the start of some bytes is. qcow2 pads compressed clusters to sectors, and Node's
 * decoder takes what follows a frame for the next one. Layout: RFC 8878, section 3.1.1.
 */
import { AppError } from '../model/errors.ts';

const magic = 0xfd2f_b528;
const contentSizeBytes = [0, 2, 4, 8];
const dictionaryBytes = [0, 1, 2, 4];

/** Throws `image_corrupt` when there is no whole frame. */
export function zstdFrameBytes(bytes: Buffer): number {
  if (bytes.length < 6 || bytes.readUInt32LE(0) !== magic) throw corrupt('no frame begins there');
  const descriptor = bytes[4]!;
  const isSingleSegment = (descriptor & 0x20) !== 0;
  const sizeFlag = descriptor >> 6;
  const sizeBytes = sizeFlag === 0 && isSingleSegment ? 1 : contentSizeBytes[sizeFlag]!;
  let at = 5 + (isSingleSegment ? 0 : 1) + dictionaryBytes[descriptor & 3]! + sizeBytes;
  for (let isLast = false; !isLast; ) {
    if (at + 3 > bytes.length) throw corrupt('the frame is cut off');
    const header = bytes.readUIntLE(at, 3);
    isLast = (header & 1) === 1;
    const type = (header >> 1) & 3;
    if (type === 3) throw corrupt('a block has the reserved type');
    // A block of type 1 repeats one byte.
    at += 3 + (type === 1 ? 1 : header >> 3);
  }
  if ((descriptor & 4) !== 0) at += 4;
  if (at > bytes.length) throw corrupt('the frame is cut off');
  return at;
}

const corrupt = (met: string): AppError =>
  new AppError('image_corrupt', `Read zstd: ${met}, wanted a whole frame`);
