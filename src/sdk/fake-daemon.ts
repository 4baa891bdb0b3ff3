/**
 * For tests only: a real HTTP (or TLS) server that answers as the test says. It keeps what it was asked, and
 * counts its connections.
 */
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http';
import { createServer as createTlsServer } from 'node:https';
import type { AddressInfo, Socket } from 'node:net';
import type { TlsOptions } from 'node:tls';

export interface FakeRequest {
  method: string;
  /** Path and query as they came. */
  path: string;
  headers: IncomingMessage['headers'];
  body: string;
}

export type Answer = (request: FakeRequest, response: ServerResponse, raw: IncomingMessage) => unknown;

export interface FakeDaemon extends AsyncDisposable {
  url: string;
  requests: FakeRequest[];
  connections(): number;
  /** Cuts every connection, as a crash does. */
  cut(): void;
}

/** `hasty` daemons answer before they have read the body. */
export async function fakeDaemon(
  answer: Answer,
  tls?: TlsOptions,
  { hasty = false } = {},
): Promise<FakeDaemon> {
  const requests: FakeRequest[] = [];
  const sockets = new Set<Socket>();
  let connections = 0;
  const onRequest = async (raw: IncomingMessage, response: ServerResponse) => {
    const chunks: Buffer[] = [];
    if (!hasty) for await (const chunk of raw) chunks.push(chunk as Buffer);
    const request: FakeRequest = {
      method: raw.method ?? '',
      path: raw.url ?? '',
      headers: raw.headers,
      body: Buffer.concat(chunks).toString(),
    };
    requests.push(request);
    await answer(request, response, raw);
  };
  const handle = (raw: IncomingMessage, response: ServerResponse) => {
    onRequest(raw, response).catch(() => response.destroy());
  };
  const server = tls ? createTlsServer(tls, handle) : createServer(handle);
  server.on(tls ? 'secureConnection' : 'connection', (socket: Socket) => {
    connections += 1;
    sockets.add(socket);
    socket.on('close', () => sockets.delete(socket));
    socket.on('error', () => {});
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const { port } = server.address() as AddressInfo;
  const cut = () => {
    for (const socket of sockets) socket.destroy();
  };
  return {
    url: `${tls ? 'https' : 'http'}://127.0.0.1:${port}`,
    requests,
    connections: () => connections,
    cut,
    async [Symbol.asyncDispose]() {
      const closed = new Promise((resolve) => server.close(resolve));
      cut();
      await closed;
    },
  };
}

export function reply(response: ServerResponse, status: number, body?: unknown): void {
  if (body === undefined) {
    response.writeHead(status).end();
    return;
  }
  response.writeHead(status, { 'content-type': 'application/json' }).end(JSON.stringify(body));
}

export const refusal = (code: string, message: string, details: object = {}) => ({
  error: { code, message, details, requestId: 'req-1' },
});
