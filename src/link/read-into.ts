/**
 * Reads of a socket into memory of ours. Otherwise Node makes a buffer for each, and at hundreds of megabytes a second
 * collecting those costs more CPU than moving the bytes.
 *
 * Node's own way to ask for this, `onread`, is only for sockets that it connects itself. A socket that a server has
 * accepted knows it as well, by three fields that `onread` would have set; where a Node does not have them, bytes come by
 * 'data' and are copied.
 */
import type { Socket } from 'node:net';

/** Where the next bytes go; never empty. Asked before each read, and its answer holds until bytes came. */
export type NextBuffer = () => Uint8Array;
/** Bytes at the start of the last buffer, to be used or copied now. `false` pauses the socket, which `resume` ends. */
export type OnBytes = (bytes: Uint8Array) => boolean;

/** Begins to read; true if bytes come into `next` without a detour. */
export function readInto(socket: Socket, next: NextBuffer, onBytes: OnBytes): boolean {
  const copy = (bytes: Uint8Array): void => {
    let goesOn = true;
    for (let at = 0; at < bytes.length; ) {
      const buffer = next();
      const part = bytes.subarray(at, at + buffer.length);
      buffer.set(part);
      goesOn = onBytes(buffer.subarray(0, part.length));
      at += part.length;
    }
    if (!goesOn) socket.pause();
  };
  // What came before is read first.
  for (let bytes = socket.read(); bytes !== null; bytes = socket.read()) copy(bytes);
  const isDirect = readDirectly(socket, next, onBytes);
  if (!isDirect) socket.on('data', copy);
  socket.resume();
  return isDirect;
}

function readDirectly(socket: Socket, next: NextBuffer, onBytes: OnBytes): boolean {
  const fields = Object.getOwnPropertySymbols(socket);
  const [buffer, generator, callback] = ['kBuffer', 'kBufferGen', 'kBufferCb'].map((name) =>
    fields.find(({ description }) => description === name),
  );
  const raw = socket as unknown as Record<symbol, unknown> & { _handle?: Handle | null };
  const handle = raw._handle;
  if (!buffer || !generator || !callback || typeof handle?.useUserBuffer !== 'function') return false;
  const first = next();
  raw[buffer] = first;
  raw[generator] = next;
  raw[callback] = (length: number, into: Uint8Array) => onBytes(into.subarray(0, length));
  handle.useUserBuffer(first);
  return true;
}

interface Handle {
  useUserBuffer?(buffer: Uint8Array): void;
}
