/**
 * One connection over which a server sends the sequence as fast as the network takes it, and a client that checks each
 * byte. Under `mptcpize run` the connection is an MPTCP one.
 */
import { once } from 'node:events';
import { connect, createServer, type Socket } from 'node:net';
import { aborted, type Endpoint, ended, nowMs } from './echo.ts';
import { type Gap, GapMeter } from './gap-meter.ts';
import { SequenceCheck, sequenceBytes } from './sequence.ts';

export interface StreamSample {
  /** Since the epoch. */
  atMs: number;
  /** Since the sample before. */
  bytes: number;
  bps: number;
  totalBytes: number;
}

export interface StreamOptions {
  from: Endpoint;
  /** The address of ours that it connects from; what the route says if absent. */
  localAddress?: string;
  everyMs: number;
  /** It ends after so many. */
  maxBytes?: number;
  signal: AbortSignal;
  onSample?: (sample: StreamSample) => void;
}

export interface StreamSummary {
  verifiedBytes: number;
  durationMs: number;
  meanBps: number;
  /** Without one byte. */
  longestGap: Gap | undefined;
  gaps: Gap[];
  /** Why the connection ended before it was told to, or which byte was wrong; undefined if neither. */
  brokenBy: string | undefined;
}

const pieceBytes = 64 * 1024;

export async function receiveStream(options: StreamOptions): Promise<StreamSummary> {
  const { from, localAddress, everyMs, maxBytes = Number.POSITIVE_INFINITY, signal, onSample } = options;
  const check = new SequenceCheck();
  const meter = new GapMeter();
  const socket = connect({ ...from, ...(localAddress === undefined ? {} : { localAddress }) });
  await once(socket, 'connect', { signal });
  const broken = ended(socket);
  const beganMs = nowMs();
  const sample = sampler(beganMs, () => check.bytes);
  const timer = setInterval(() => onSample?.(sample()), everyMs);
  const done = Promise.withResolvers<string | undefined>();
  socket.on('data', (bytes) => {
    meter.sign(nowMs());
    try {
      check.push(bytes);
    } catch (error) {
      done.resolve((error as Error).message);
    }
    if (check.bytes >= maxBytes) done.resolve(undefined);
  });
  const brokenBy = await Promise.race([done.promise, broken, aborted(signal)]);
  clearInterval(timer);
  socket.destroy();
  const endedMs = nowMs();
  meter.end(endedMs);
  onSample?.(sample());
  const durationMs = endedMs - beganMs;
  return {
    verifiedBytes: check.bytes,
    durationMs,
    meanBps: Math.round((check.bytes * 8000) / durationMs),
    longestGap: meter.longest,
    gaps: meter.gaps,
    brokenBy,
  };
}

function sampler(beganMs: number, total: () => number): () => StreamSample {
  let lastMs = beganMs;
  let lastBytes = 0;
  return () => {
    const atMs = nowMs();
    const totalBytes = total();
    const bytes = totalBytes - lastBytes;
    const bps = atMs > lastMs ? Math.round((bytes * 8000) / (atMs - lastMs)) : 0;
    lastMs = atMs;
    lastBytes = totalBytes;
    return { atMs, bytes, bps, totalBytes };
  };
}

/** Sends to whoever connects, until the signal. `rateBps`: about, over a second; as fast as it goes if absent. */
export async function serveStream(at: Endpoint, signal: AbortSignal, rateBps?: number): Promise<void> {
  const open = new Set<Socket>();
  const server = createServer((socket) => {
    open.add(socket);
    socket.on('error', () => {}).on('close', () => open.delete(socket));
    void send(socket, rateBps);
  }).listen(at.port, at.host);
  await once(server, 'listening');
  signal.addEventListener('abort', () => {
    server.close();
    for (const socket of open) socket.destroy();
  });
}

async function send(socket: Socket, rateBps: number | undefined): Promise<void> {
  const beganMs = nowMs();
  const closed = new Promise((resolve) => socket.once('close', resolve));
  for (let offset = 0; !socket.destroyed; offset += pieceBytes) {
    if (!socket.write(sequenceBytes(offset, pieceBytes)))
      await Promise.race([new Promise((resolve) => socket.once('drain', resolve)), closed]);
    if (rateBps === undefined) continue;
    const dueMs = beganMs + (offset * 8000) / rateBps;
    await new Promise((resolve) => setTimeout(resolve, Math.max(0, dueMs - nowMs())));
  }
}
