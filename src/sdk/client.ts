/**
 * The client of a cloudlet: one method for each operation of the contract, and a few that go on where a plain
 * call is not enough. It runs as it is in browsers and in Node; `sdk/node.ts` adds TLS with the fleet's own CA.
 */
import { endpoints, type OperationName } from '../contract/endpoints.ts';
import type { RouteInput } from '../contract/routes.ts';
import { attachConsole, type ConsoleSession, type WebSocketClass } from './console.ts';
import { type EventsOptions, events } from './events.ts';
import { type PagesOptions, pages } from './pages.ts';
import { type Connection, call, type RequestParts } from './request.ts';
import type {
  CallOptions,
  Calls,
  Image,
  ListPage,
  Operation,
  StreamedOperation,
  ViperEvent,
} from './types.ts';
import { type WaitOptions, wait } from './wait.ts';

export type { ConsoleEnd, ConsoleSession } from './console.ts';
export { type ClientErrorCode, ViperError, type ViperErrorCode } from './errors.ts';
export type { EventsOptions } from './events.ts';
export type { PagesOptions } from './pages.ts';
export type * from './types.ts';
export type { WaitOptions } from './wait.ts';

export interface ConnectOptions {
  /** Where the daemon answers, such as `https://edge1.example.org:7443`. */
  url: string;
  /** A bearer token; none if a client certificate speaks for the caller. */
  token?: string;
  /** Instead of the global ones. */
  fetch?: typeof fetch;
  WebSocket?: WebSocketClass;
}

export interface ImportInput extends CallOptions {
  query?: RouteInput<'importImage'>['query'];
  /**
   * The file: a Blob, as browsers and `fs.openAsBlob` have it, or a stream of its bytes. Browsers stream bodies over
   * HTTP/2 only, which the daemon does not speak: there, it has to be a Blob.
   */
  body: Blob | ReadableStream<Uint8Array>;
  /** Bytes of a stream, if known: the daemon then checks its disk space before it takes them. */
  sizeBytes?: number;
}

export interface Viper extends Calls {
  readonly url: string;
  importImage(input: ImportInput): Promise<Image>;
  /** Resolves when the console is attached. */
  attachConsole(input: { params: { vm: string } } & CallOptions): Promise<ConsoleSession>;
  /** Events as they come, over as many connections as it takes. */
  events(options?: EventsOptions): AsyncGenerator<ViperEvent, void>;
  /** Events of the device whose token the client has, and of its VM. */
  deviceEvents(options?: Omit<EventsOptions, 'after'>): AsyncGenerator<ViperEvent, void>;
  /** The operation once it has succeeded; rejects with its error if it failed. */
  wait(operation: Operation | string, options?: WaitOptions): Promise<Operation>;
  /** All items of a list: `for await (const vm of viper.pages(viper.listVms))`. */
  pages<T>(list: ListPage<T>, options?: PagesOptions): AsyncGenerator<T>;
}

const streamed: Record<StreamedOperation, true> = {
  importImage: true,
  attachConsole: true,
  streamEvents: true,
  streamDeviceEvents: true,
};

/** A client; nothing is sent before its first call. Throws a TypeError if the URL is none. */
export function connect(options: ConnectOptions): Viper {
  const connection: Connection = {
    url: baseUrl(options.url),
    token: options.token,
    // Browsers refuse a `fetch` that is called as a method of anything but the window.
    fetch: options.fetch ?? ((...args) => globalThis.fetch(...args)),
  };
  const names = (Object.keys(endpoints) as OperationName[]).filter((name) => !(name in streamed));
  // One table makes both the methods and their types, so what is built here has the type that is claimed.
  const calls = Object.fromEntries(
    names.map((name) => [name, (input: RequestParts = {}) => call(connection, name, input)]),
  ) as unknown as Calls;
  return {
    ...calls,
    url: connection.url,
    importImage: (input) => importImage(connection, input),
    attachConsole: (input) =>
      attachConsole(connection, options.WebSocket ?? globalThis.WebSocket, calls.getVm, input),
    events: (eventsOptions) => events(connection, 'streamEvents', eventsOptions),
    deviceEvents: (eventsOptions) => events(connection, 'streamDeviceEvents', eventsOptions),
    wait: (operation, waitOptions) => wait(calls.getOperation, operation, waitOptions),
    pages,
  };
}

async function importImage(connection: Connection, input: ImportInput): Promise<Image> {
  const { body, query, sizeBytes, signal } = input;
  const reply = await call(connection, 'importImage', {
    query,
    bytes: body,
    headers: {
      'content-type': 'application/octet-stream',
      // Browsers drop this header and set it themselves.
      ...(sizeBytes === undefined ? {} : { 'content-length': String(sizeBytes) }),
    },
    signal,
  });
  return reply as Image;
}

function baseUrl(text: string): string {
  const url = URL.canParse(text) ? new URL(text) : undefined;
  if (!url || !/^https?:$/.test(url.protocol) || url.username || url.search || url.hash) {
    throw new TypeError(`'${text}' is not the URL of a daemon; it should look like https://edge1:7443`);
  }
  return url.href.replace(/\/+$/, '');
}
