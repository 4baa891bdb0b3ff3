/**
 * The events of a cloudlet as an async iterable that outlives its connections: after a cut, or when not even a
 * keep-alive comes for a while, it connects again and asks for what came after the last event it gave. So each
 * event comes once; an event of kind `gap` says that the daemon no longer had some after `data.afterId`.
 */
import { backOff, delay } from './delay.ts';
import { isObject, unreachable, ViperError } from './errors.ts';
import { type Connection, open } from './request.ts';
import { EventStreamParser, type StreamMessage } from './sse.ts';
import type { CallOptions, ViperEvent } from './types.ts';

export interface EventsOptions extends CallOptions {
  /** Only events after this id; absent: only what happens from now on. */
  after?: number;
  /** Called when the stream is up, at first and after each cut. */
  onConnected?: () => void;
  /** Without any byte for this long, the connection counts as dead. */
  silenceMs?: number;
  /** How long to try to connect again after a cut. */
  reconnectMs?: number;
}

/** What one connection leaves to the next. */
interface Position {
  connected: boolean;
  /** When the last byte came. */
  aliveAt: number;
  lastId: string | undefined;
  /** The wait before the next connection that the daemon asked for. */
  retryMs: number;
}

/**
 * Rejects at once when the first connection is refused, later only when the daemon refuses for good (a revoked
 * token) or stays away for `reconnectMs`.
 */
export async function* events(
  connection: Connection,
  stream: 'streamEvents' | 'streamDeviceEvents',
  options: EventsOptions = {},
): AsyncGenerator<ViperEvent, void> {
  const { signal, reconnectMs = 300_000 } = options;
  const position: Position = { connected: false, aliveAt: Date.now(), lastId: undefined, retryMs: 0 };
  const pauses = backOff(250, 10_000);
  for (;;) {
    signal?.throwIfAborted();
    try {
      for await (const message of oneConnection(connection, stream, position, options)) {
        pauses.reset();
        const event = eventOf(message);
        // The daemon closes, or dropped a slow reader: both are mended by connecting again.
        if (event.kind !== 'end') yield event;
      }
    } catch (error) {
      signal?.throwIfAborted();
      const goesOn = position.connected && Date.now() - position.aliveAt < reconnectMs;
      if (!goesOn || !isTransient(error)) throw error;
    }
    await delay(Math.max(pauses.nextMs(), position.retryMs), signal);
  }
}

/** The messages of one connection, until it ends or is cut. */
async function* oneConnection(
  connection: Connection,
  stream: 'streamEvents' | 'streamDeviceEvents',
  position: Position,
  options: EventsOptions,
): AsyncGenerator<StreamMessage> {
  const { signal, after, silenceMs = 60_000, onConnected } = options;
  const silent = new ViperError('unreachable', `The event stream was silent for ${silenceMs} ms`);
  const end = new AbortController();
  const hangUp = () => end.abort(silent);
  let silence = setTimeout(hangUp, silenceMs);
  const parser = new EventStreamParser();
  try {
    const reply = await open(connection, stream, {
      ...(position.lastId === undefined && after !== undefined ? { query: { after } } : {}),
      headers: {
        accept: 'text/event-stream',
        ...(position.lastId === undefined ? {} : { 'last-event-id': position.lastId }),
      },
      signal: signal ? AbortSignal.any([signal, end.signal]) : end.signal,
    });
    const body = await eventStreamOf(reply);
    position.connected = true;
    position.aliveAt = Date.now();
    onConnected?.();
    for await (const bytes of bytesOf(body, connection)) {
      clearTimeout(silence);
      silence = setTimeout(hangUp, silenceMs);
      position.aliveAt = Date.now();
      for (const message of parser.push(bytes)) {
        position.lastId = message.id ?? position.lastId;
        yield message;
      }
      position.lastId = parser.lastId ?? position.lastId;
      position.retryMs = Math.min(parser.retryMs ?? 0, 30_000);
    }
  } finally {
    clearTimeout(silence);
    end.abort();
  }
}

async function eventStreamOf(reply: Response): Promise<ReadableStream<Uint8Array>> {
  const type = reply.headers.get('content-type') ?? 'no content type';
  if (reply.body && type.startsWith('text/event-stream')) return reply.body;
  await reply.body?.cancel();
  throw new ViperError(
    'bad_reply',
    `streamEvents was answered with ${type} instead of an event stream. Does the URL lead to a Viper daemon?`,
    { status: reply.status },
  );
}

/** The bytes of a body; a cut is told as `unreachable`. */
async function* bytesOf(
  body: ReadableStream<Uint8Array>,
  connection: Connection,
): AsyncGenerator<Uint8Array> {
  const reader = body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } catch (error) {
    throw error instanceof ViperError ? error : unreachable('streamEvents', connection.url, error);
  } finally {
    reader.cancel().catch(() => {});
  }
}

function eventOf(message: StreamMessage): ViperEvent {
  let value: unknown;
  try {
    value = JSON.parse(message.data);
  } catch {
    // Told below, with the text.
  }
  if (isObject(value) && typeof value.kind === 'string' && typeof value.id === 'number') {
    return value as unknown as ViperEvent;
  }
  throw new ViperError(
    'bad_reply',
    `An event is not the JSON of one: ${JSON.stringify(message.data.slice(0, 100))}`,
  );
}

/** Whether the same request may be answered better in a moment. */
const isTransient = (error: unknown): boolean =>
  error instanceof ViperError &&
  (error.code === 'unreachable' || error.code === 'too_many' || error.status >= 500);
