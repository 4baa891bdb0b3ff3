/** Frames to bytes. */
import { KiB } from '../model/units.ts';
import {
  dataHeaderBytes,
  type Frame,
  type FrameType,
  frameTypes,
  type HelloFrame,
  headerBytes,
  helloFixedBytes,
  helloKinds,
  maxReasonBytes,
  offsetBytes,
  refuseReasons,
  secretBytes,
} from './frames.ts';
import type { Run } from './outgoing.ts';

/** Up to this size a copy is cheaper than a write of its own. */
const smallPieceBytes = 2 * KiB;

/**
 * DATA, in buffers that are to be written one after the other: with its header where there is room for it, a small
 * payload copied behind its header, and a large one left as it is.
 */
export function encodeRun({ offset, bytes, withRoom }: Run): Uint8Array[] {
  const header = withRoom ?? Buffer.allocUnsafe(dataHeaderBytes);
  header[0] = frameTypes.indexOf('data') + 1;
  header.writeUIntBE(offsetBytes + bytes.length, 1, 3);
  writeOffset(header, offset, headerBytes);
  if (withRoom) return [withRoom];
  return bytes.length <= smallPieceBytes ? [Buffer.concat([header, bytes])] : [header, bytes];
}

/** Any frame but DATA, whose payload is not copied. Texts that are too long are cut. */
export function encodeFrame(frame: Exclude<Frame, { type: 'data' }>): Buffer {
  switch (frame.type) {
    case 'hello':
      return encodeHello(frame);
    case 'welcome':
    case 'ack': {
      const bytes = startFrame(frame.type, 2 * offsetBytes);
      writeOffset(bytes, frame.received, headerBytes);
      writeOffset(bytes, frame.limit, headerBytes + offsetBytes);
      return bytes;
    }
    case 'ping':
    case 'pong': {
      const bytes = startFrame(frame.type, 4);
      bytes.writeUInt32BE(frame.token, headerBytes);
      return bytes;
    }
    case 'end': {
      const bytes = startFrame('end', offsetBytes);
      writeOffset(bytes, frame.offset, headerBytes);
      return bytes;
    }
    case 'refuse': {
      const text = encodeWhy(frame);
      const bytes = startFrame('refuse', 1 + text.length);
      bytes[headerBytes] = refuseReasons.indexOf(frame.reason) + 1;
      bytes.set(text, headerBytes + 1);
      return bytes;
    }
    case 'reset': {
      const text = encodeWhy(frame);
      const bytes = startFrame('reset', text.length);
      bytes.set(text, headerBytes);
      return bytes;
    }
    case 'done':
      return startFrame('done', 0);
  }
}

function encodeHello(frame: HelloFrame): Buffer {
  const text = Buffer.from(JSON.stringify(frame.metadata));
  const bytes = startFrame('hello', helloFixedBytes + text.length);
  let at = headerBytes;
  at = bytes.writeUInt8(helloKinds.indexOf(frame.kind) + 1, at);
  at = bytes.writeUInt32BE(frame.attempt, at);
  at += bytes.write(frame.sessionId, at, 'hex');
  bytes.set(frame.secret, at);
  at += secretBytes;
  writeOffset(bytes, frame.received, at);
  writeOffset(bytes, frame.limit, at + offsetBytes);
  bytes.set(text, at + 2 * offsetBytes);
  return bytes;
}

/** JSON that fits, whatever the texts are: in JSON a character takes at most six bytes. */
function encodeWhy({ code, message }: { code: string; message: string }): Buffer {
  for (let length = message.length; ; length = Math.min(length - 1, Math.floor(length / 2))) {
    const text = Buffer.from(JSON.stringify({ code: code.slice(0, 64), message: message.slice(0, length) }));
    if (text.length <= maxReasonBytes) return text;
  }
}

/** A buffer with the header set and the body still to be. */
function startFrame(type: FrameType, length: number): Buffer {
  const bytes = Buffer.alloc(headerBytes + length);
  bytes[0] = frameTypes.indexOf(type) + 1;
  bytes.writeUIntBE(length, 1, 3);
  return bytes;
}

function writeOffset(body: Buffer, value: number, at: number): void {
  body.writeUInt32BE(Math.floor(value / 2 ** 32), at);
  body.writeUInt32BE(value % 2 ** 32, at + 4);
}
