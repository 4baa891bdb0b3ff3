/** For tests only: an HTTPS server with the link attached, a path to it, and a client that opens sessions over it. */
import { once } from 'node:events';
import { createServer } from 'node:https';
import type { AddressInfo } from 'node:net';
import { type AttachLinkOptions, attachLink, type Link } from './attach-link.ts';
import { type FakeFleet, fakeFleet, identifyFake } from './fake-fleet.ts';
import { type FakePath, fakePath } from './fake-path.ts';
import type { LinkLimits } from './limits.ts';
import { type OpenSessionOptions, openSession } from './open-session.ts';
import { serverAlpnProtocols } from './purposes.ts';
import type { Session } from './session.ts';

/** Quick enough for tests, slow enough for a busy machine. */
export const quick: Partial<LinkLimits> = {
  pingMs: 50,
  deadAfterMs: 500,
  firstBackOffMs: 5,
  mostBackOffMs: 50,
  openTimeoutMs: 5000,
  helloTimeoutMs: 2000,
  ackDelayMs: 5,
};

export interface FakeDaemons extends AsyncDisposable {
  fleet: FakeFleet;
  path: FakePath;
  link: Link;
  /** The port behind the path. */
  port: number;
  /** Opens a session from cloudlet `a` to cloudlet `b`, over the path. */
  open(options?: Partial<OpenSessionOptions>): Promise<Session>;
  /** The next session that the server accepts. */
  accepted(): Promise<Session>;
  /** Both ends of a new session. */
  pair(options?: Partial<OpenSessionOptions>): Promise<{ client: Session; server: Session }>;
  /** Waits until the condition holds. */
  until(condition: () => boolean, what: string): Promise<void>;
}

export async function fakeDaemons(options: Partial<AttachLinkOptions> = {}): Promise<FakeDaemons> {
  await using stack = new AsyncDisposableStack();
  const fleet = await fakeFleet();
  const server = createServer(
    {
      ...(await fleet.issue('b')),
      ALPNProtocols: [...serverAlpnProtocols],
      minVersion: 'TLSv1.3',
      requestCert: true,
      rejectUnauthorized: false,
    },
    (_request, response) => response.end('http'),
  );
  const waiting: Session[] = [];
  const waiters: ((session: Session) => void)[] = [];
  const sessions: Session[] = [];
  const onSession = (session: Session) => {
    session.on('error', () => {});
    const waiter = waiters.shift();
    if (waiter) waiter(session);
    else waiting.push(session);
  };
  const link = attachLink(server, {
    identify: identifyFake,
    accept: () => ({ onSession }),
    limits: quick,
    ...options,
  });
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = server.address() as AddressInfo;
  stack.defer(async () => {
    await link.close();
    server.close();
    server.closeAllConnections();
    await once(server, 'close');
  });
  const path = stack.use(await fakePath(port));
  const credentials = await fleet.issue('a');
  stack.defer(async () => {
    await Promise.all(sessions.map((session) => session.abandon()));
  });
  const open = async (more: Partial<OpenSessionOptions> = {}): Promise<Session> => {
    const session = await openSession({
      url: path.url,
      tls: credentials,
      expectCloudletId: 'b',
      identify: identifyFake,
      purpose: 'viper-memory/1',
      hello: { ticket: 'yes' },
      limits: quick,
      ...more,
    });
    session.on('error', () => {});
    sessions.push(session);
    return session;
  };
  const accepted = (): Promise<Session> => {
    const session = waiting.shift();
    return session ? Promise.resolve(session) : new Promise((resolve) => waiters.push(resolve));
  };
  const owned = stack.move();
  return {
    fleet,
    path,
    link,
    port,
    open,
    accepted,
    async pair(more) {
      const [client, other] = await Promise.all([open(more), accepted()]);
      return { client, server: other };
    },
    async until(condition, what) {
      const deadlineMs = performance.now() + 20_000;
      while (!condition()) {
        if (performance.now() > deadlineMs) throw new Error(`Waited in vain until ${what}`);
        await new Promise((resolve) => setTimeout(resolve, 5));
      }
    },
    [Symbol.asyncDispose]: () => owned.disposeAsync(),
  };
}
