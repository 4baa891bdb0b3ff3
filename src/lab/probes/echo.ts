/**
 * Asks an echo server every some milliseconds and notes when the answers come, over UDP (what the network does) or one
 * TCP connection (what an application sees). Under `mptcpize run` the connection is an MPTCP one.
 */
import { createSocket } from 'node:dgram';
import { once } from 'node:events';
import { connect, createServer } from 'node:net';
import { type Gap, GapMeter } from './gap-meter.ts';

export interface Endpoint {
  host: string;
  port: number;
}

export interface EchoOptions {
  to: Endpoint;
  protocol: 'udp' | 'tcp';
  intervalMs: number;
  /** The address of ours that it is asked from; what the route says if absent. */
  from?: string;
  /** Ends it. */
  signal: AbortSignal;
  /** Called for each answer: which, when it was asked and when it came, in ms since the epoch. */
  onAnswer?: (answer: { sequence: number; sentMs: number; receivedMs: number }) => void;
  everyMs?: number;
  onSample?: (sample: EchoSample) => void;
}

/** What has been heard since the sample before. */
export interface EchoSample {
  /** Since the epoch. */
  atMs: number;
  /** The shortest round trip; undefined in a silence. */
  rttMs: number | undefined;
  /** How long the silence lasts by now. */
  silentMs: number;
}

export interface EchoSummary {
  sent: number;
  received: number;
  rttMs: { min: number; median: number; max: number } | undefined;
  longestGap: Gap | undefined;
  gaps: Gap[];
  /** Why the connection ended before it was told to; undefined if it did not. */
  brokenBy: string | undefined;
}

/** Sequence number and time of sending; 16 bytes. */
const messageBytes = 16;
/** Round trips kept for the median: at 100 a second, some hours. */
const maxKept = 1_000_000;

export const nowMs = (): number => performance.timeOrigin + performance.now();

export async function probeEcho(options: EchoOptions): Promise<EchoSummary> {
  const { to, protocol, intervalMs, from, signal, onAnswer, everyMs, onSample } = options;
  const meter = new GapMeter();
  const rtts: number[] = [];
  let sent = 0;
  let received = 0;
  let shortestMs = Number.POSITIVE_INFINITY;
  let heardMs = nowMs();
  const take = (message: Buffer) => {
    const sequence = Number(message.readBigUInt64BE(0));
    const sentMs = message.readDoubleBE(8);
    const receivedMs = nowMs();
    received += 1;
    if (rtts.length < maxKept) rtts.push(receivedMs - sentMs);
    meter.sign(receivedMs);
    shortestMs = Math.min(shortestMs, receivedMs - sentMs);
    heardMs = receivedMs;
    onAnswer?.({ sequence, sentMs, receivedMs });
  };
  const channel =
    protocol === 'udp' ? await openUdp({ to, from }, take) : await openTcp({ to, from }, take, signal);
  const ask = () => {
    const message = Buffer.allocUnsafe(messageBytes);
    message.writeBigUInt64BE(BigInt(sent), 0);
    message.writeDoubleBE(nowMs(), 8);
    sent += 1;
    channel.send(message);
  };
  ask();
  const timer = setInterval(ask, intervalMs);
  const sample = () => {
    const atMs = nowMs();
    const rttMs = Number.isFinite(shortestMs) ? shortestMs : undefined;
    shortestMs = Number.POSITIVE_INFINITY;
    onSample?.({ atMs, rttMs, silentMs: atMs - heardMs });
  };
  const sampling = everyMs === undefined ? undefined : setInterval(sample, everyMs);
  const brokenBy = await Promise.race([channel.broken, aborted(signal)]);
  clearInterval(timer);
  clearInterval(sampling);
  meter.end(nowMs());
  channel.close();
  return { sent, received, rttMs: spread(rtts), longestGap: meter.longest, gaps: meter.gaps, brokenBy };
}

interface Channel {
  send(message: Buffer): void;
  close(): void;
  broken: Promise<string>;
}

interface Way {
  to: Endpoint;
  from: string | undefined;
}

async function openUdp({ to, from }: Way, take: (message: Buffer) => void): Promise<Channel> {
  const socket = createSocket('udp4');
  if (from !== undefined) socket.bind(0, from);
  socket.on('message', (message) => {
    if (message.length === messageBytes) take(message);
  });
  // A network that is away, or a port that nobody listens at yet: a packet that is lost.
  socket.on('error', () => {});
  return {
    send: (message) => socket.send(message, to.port, to.host, () => {}),
    close: () => void socket.close(),
    broken: new Promise(() => {}),
  };
}

async function openTcp(
  { to, from }: Way,
  take: (message: Buffer) => void,
  signal: AbortSignal,
): Promise<Channel> {
  const socket = connect({ ...to, noDelay: true, ...(from === undefined ? {} : { localAddress: from }) });
  await once(socket, 'connect', { signal });
  let rest: Buffer = Buffer.alloc(0);
  socket.on('data', (bytes) => {
    rest = Buffer.concat([rest, bytes]);
    for (; rest.length >= messageBytes; rest = rest.subarray(messageBytes)) take(rest);
  });
  return {
    // What was asked during a silence is asked once it is over: no message is left out of the stream.
    send: (message) => void socket.write(message),
    close: () => void socket.destroy(),
    broken: ended(socket),
  };
}

/** Serves both protocols at one port until the signal. */
export async function serveEcho({ host, port }: Endpoint, signal: AbortSignal): Promise<void> {
  const datagrams = createSocket('udp4').on('error', () => {});
  datagrams.on('message', (message, { address, port: from }) =>
    datagrams.send(message, from, address, () => {}),
  );
  datagrams.bind(port, host);
  const server = createServer({ noDelay: true }, (socket) => socket.on('error', () => {}).pipe(socket));
  server.listen(port, host);
  await Promise.all([once(datagrams, 'listening'), once(server, 'listening')]);
  signal.addEventListener('abort', () => {
    datagrams.close();
    server.close();
  });
}

/** Resolves when the signal comes. */
export const aborted = (signal: AbortSignal): Promise<undefined> =>
  new Promise((resolve) => {
    if (signal.aborted) resolve(undefined);
    else signal.addEventListener('abort', () => resolve(undefined), { once: true });
  });

/** Why a connection ended, once it does. */
export const ended = (socket: ReturnType<typeof connect>): Promise<string> =>
  new Promise((resolve) => {
    socket.on('error', (error: NodeJS.ErrnoException) => resolve(error.code ?? error.message));
    socket.on('end', () => resolve('closed by the other end'));
  });

function spread(all: number[]): EchoSummary['rttMs'] {
  if (all.length === 0) return undefined;
  const sorted = Float64Array.from(all).sort();
  return { min: sorted[0]!, median: sorted[Math.floor(sorted.length / 2)]!, max: sorted.at(-1)! };
}
