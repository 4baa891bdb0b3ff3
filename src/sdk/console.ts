/**
 * The live serial console of a VM as two streams of bytes over one WebSocket. The token travels as a
 * subprotocol, the only place where browsers let it; so Node and browsers go the same way.
 */
import { isAllowed } from '../model/states.ts';
import { isObject, ViperError } from './errors.ts';
import { type Connection, pathOf } from './request.ts';
import type { CallOptions, Calls } from './types.ts';

/** The part of a WebSocket class that is used: the browser's, Node's and undici's have it. */
export type WebSocketClass = new (url: string, protocols: string[]) => WebSocket;

export interface ConsoleEnd {
  /** Close code of the WebSocket: 1000 is a normal end, 1006 a cut. */
  code: number;
  reason: string;
}

export interface ConsoleSession extends AsyncDisposable {
  /** What the VM writes. It fails if more than 4 MiB wait unread. */
  readonly readable: ReadableStream<Uint8Array>;
  /** What the VM reads. */
  readonly writable: WritableStream<Uint8Array>;
  /** Resolves, and never rejects, when the session has ended for whatever reason. */
  readonly closed: Promise<ConsoleEnd>;
  close(): void;
}

const maxUnreadBytes = 4 * 1024 * 1024;
const maxUnsentBytes = 256 * 1024;

export async function attachConsole(
  connection: Connection,
  WebSocket: WebSocketClass,
  getVm: Calls['getVm'],
  input: { params: { vm: string } } & CallOptions,
): Promise<ConsoleSession> {
  const { signal } = input;
  const address = connection.url.replace(/^http/, 'ws') + pathOf('attachConsole', input);
  const protocols = ['viper.console', ...(connection.token ? [`bearer.${connection.token}`] : [])];
  signal?.throwIfAborted();
  const open = () => openSession(new WebSocket(address, protocols), signal);
  const session = await open();
  if (session) return session;
  const refusal = await whyRefused(connection, getVm, input);
  // The daemon asks its callers for a certificate, optional as it is. Chromium gives up a WebSocket that is asked
  // before any fetch was; by now the question after the reason has been that fetch.
  const second = refusal.code === 'unreachable' && (await open());
  if (second) return second;
  throw refusal;
}

/** The session once the socket is open; undefined if it was refused. */
async function openSession(
  socket: WebSocket,
  signal: AbortSignal | undefined,
): Promise<ConsoleSession | undefined> {
  socket.binaryType = 'arraybuffer';
  const onAbort = () => socket.close(1000);
  signal?.addEventListener('abort', onAbort, { once: true });
  const session = sessionOf(socket);
  void session.closed.then(() => signal?.removeEventListener('abort', onAbort));
  const opened = await new Promise<boolean>((resolve) => {
    socket.addEventListener('open', () => resolve(true), { once: true });
    void session.closed.then(() => resolve(false));
  });
  if (opened) return session;
  signal?.throwIfAborted();
  return undefined;
}

function sessionOf(socket: WebSocket): ConsoleSession {
  const closed = new Promise<ConsoleEnd>((resolve) => {
    socket.addEventListener('close', ({ code, reason }) => resolve({ code, reason }), { once: true });
    // A failed handshake may give an error only; `close` follows in browsers, but not everywhere.
    socket.addEventListener('error', () => setTimeout(resolve, 100, { code: 1006, reason: '' }), {
      once: true,
    });
  });
  const readable = new ReadableStream<Uint8Array>(
    {
      start(controller) {
        socket.addEventListener('message', ({ data }: MessageEvent<unknown>) => {
          const bytes =
            typeof data === 'string' ? new TextEncoder().encode(data) : new Uint8Array(data as ArrayBuffer);
          // A WebSocket cannot be told to slow down.
          if ((controller.desiredSize ?? 0) < bytes.length) {
            controller.error(new Error(`More than ${maxUnreadBytes} bytes of the console wait unread`));
            return socket.close(1000);
          }
          controller.enqueue(bytes);
        });
        void closed.then(() => {
          try {
            controller.close();
          } catch {
            // It was cancelled or has failed already.
          }
        });
      },
      cancel: () => socket.close(1000),
    },
    new ByteLengthQueuingStrategy({ highWaterMark: maxUnreadBytes }),
  );
  const writable = new WritableStream<Uint8Array>({
    async write(bytes) {
      if (socket.readyState !== 1) throw new Error('The console session has ended');
      socket.send(bytes as Uint8Array<ArrayBuffer>);
      while (socket.readyState === 1 && socket.bufferedAmount > maxUnsentBytes) {
        await new Promise((resolve) => setTimeout(resolve, 10));
      }
    },
    close: () => socket.close(1000),
    abort: () => socket.close(1000),
  });
  const close = () => socket.close(1000);
  return {
    readable,
    writable,
    closed,
    close,
    async [Symbol.asyncDispose]() {
      close();
      await closed;
    },
  };
}

/** A WebSocket keeps the refusal to itself, so the VM is asked for: its answer is the same or gives the reason. */
async function whyRefused(
  connection: Connection,
  getVm: Calls['getVm'],
  { params, signal }: { params: { vm: string } } & CallOptions,
): Promise<ViperError> {
  const vm = await getVm({ params, ...(signal ? { signal } : {}) }).catch((error: unknown) => error);
  if (vm instanceof ViperError) return vm;
  if (isObject(vm) && typeof vm.state === 'string' && !isAllowed('console', vm.state as 'running')) {
    return new ViperError(
      'wrong_state',
      `Cannot attach to the console of VM '${params.vm}': it is ${vm.state}. Start it first.`,
      { status: 409, details: { state: vm.state, allowed: vm.allowedActions } },
    );
  }
  return new ViperError(
    'unreachable',
    `The daemon at ${connection.url} did not open the console of VM '${params.vm}'. Does the token have the ` +
      'scope operate, and are too many consoles open?',
    { details: { url: connection.url } },
  );
}
