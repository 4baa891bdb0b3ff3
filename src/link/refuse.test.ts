/** Who and what the link refuses, over real TLS connections; afterwards nothing is left of them. */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { createServer as createHttpsServer } from 'node:https';
import type { AddressInfo } from 'node:net';
import { afterEach, test } from 'node:test';
import { connect, type TLSSocket } from 'node:tls';
import { AppError, type ErrorCode } from '../model/errors.ts';
import type { LinkCredentials } from './connect.ts';
import { type FakeDaemons, fakeDaemons, quick } from './fake-daemons.ts';
import { fakeFleet } from './fake-fleet.ts';
import { FrameDecoder } from './frame-decoder.ts';
import { encodeFrame, encodeRun } from './frame-encoder.ts';
import type { Frame, HelloFrame } from './frames.ts';
import { serverAlpnProtocols } from './purposes.ts';

const leftovers = () =>
  process.getActiveResourcesInfo().filter((each) => /TCP|TLS|Timeout|Immediate/.test(each)).length;

afterEach(async () => {
  // The last sockets close a moment after they were destroyed; a timer may have been cleared in this very turn.
  for (let turn = 0; turn < 500 && leftovers() > 0; turn += 1) {
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
  assert.deepEqual(
    process.getActiveResourcesInfo().filter((each) => /TCP|TLS|Timeout/.test(each)),
    [],
  );
});

const failsWith = (code: ErrorCode, reason?: string) => (error: unknown) => {
  assert.ok(error instanceof AppError, String(error));
  assert.equal(error.code, code, error.message);
  if (reason) assert.equal(error.details.reason, reason);
  return true;
};

async function nothingIsLeft(daemons: FakeDaemons): Promise<void> {
  await daemons.until(() => daemons.link.receptionCount === 0, 'no connection waits');
  await daemons.until(() => daemons.link.sessions.length === 0, 'no session is left');
}

/** A client that speaks whatever a test wants. */
interface RawClient extends Disposable {
  socket: TLSSocket;
  frames: Frame[];
  closed: boolean;
  send(...frames: (Exclude<Frame, { type: 'data' }> | Uint8Array)[]): void;
  next(type: Frame['type']): Promise<Frame>;
}

async function rawClient(
  daemons: FakeDaemons,
  credentials: LinkCredentials,
  alpn = 'viper-memory/1',
): Promise<RawClient> {
  const socket = connect({
    port: daemons.port,
    host: '127.0.0.1',
    ...credentials,
    ALPNProtocols: [alpn],
    checkServerIdentity: () => undefined,
  });
  const decoder = new FrameDecoder();
  const client: RawClient = {
    socket,
    frames: [],
    closed: false,
    send: (...frames) => {
      socket.write(Buffer.concat(frames.map((each) => ('type' in each ? encodeFrame(each) : each))));
    },
    async next(type) {
      const find = () => client.frames.findIndex((each) => each.type === type);
      await daemons.until(() => find() >= 0, `${type} arrives`);
      return client.frames.splice(find(), 1)[0]!;
    },
    [Symbol.dispose]: () => socket.destroy(),
  };
  socket.on('data', (bytes) => client.frames.push(...decoder.push(bytes).frames));
  socket.on('error', () => {});
  socket.on('close', () => {
    client.closed = true;
  });
  await once(socket, 'secureConnect');
  return client;
}

const helloOf = (more: Partial<HelloFrame> = {}): HelloFrame => ({
  type: 'hello',
  kind: 'open',
  attempt: 1,
  sessionId: randomBytes(16).toString('hex'),
  secret: randomBytes(32),
  received: 0,
  limit: 1000,
  metadata: {},
  ...more,
});

const dataAt = (offset: number, bytes: Uint8Array): Buffer =>
  Buffer.concat(encodeRun({ offset, bytes, withRoom: undefined }));

test('a client whose certificate is expired, of another CA or of no cloudlet is refused', async () => {
  await using daemons = await fakeDaemons();
  const stranger = await (await fakeFleet()).issue('a');
  const cases = [
    await daemons.fleet.issue('a', { expired: true }),
    { ...stranger, ca: daemons.fleet.ca },
    await daemons.fleet.issue('0'),
  ];
  for (const tls of cases) {
    await assert.rejects(daemons.open({ tls }), failsWith('unauthenticated', 'untrusted'));
  }
  await nothingIsLeft(daemons);
});

test('a client does not speak to a server that is not the wanted cloudlet', async () => {
  await using daemons = await fakeDaemons();
  const other = await fakeFleet();
  await assert.rejects(daemons.open({ expectCloudletId: 'c' }), failsWith('peer_untrusted'));
  await assert.rejects(daemons.open({ tls: await other.issue('a') }), failsWith('peer_untrusted'));
  await nothingIsLeft(daemons);
});

test('a client does not speak to a server with an expired certificate, nor to one without the link', async () => {
  await using daemons = await fakeDaemons();
  for (const expired of [true, false]) {
    await using stack = new AsyncDisposableStack();
    const server = createHttpsServer({
      ...(await daemons.fleet.issue('b', { expired })),
      ALPNProtocols: expired ? [...serverAlpnProtocols] : ['http/1.1'],
      requestCert: true,
    });
    server.listen(0, '127.0.0.1');
    await once(server, 'listening');
    stack.defer(async () => {
      server.close();
      await once(server, 'close');
    });
    const url = `https://127.0.0.1:${(server.address() as AddressInfo).port}`;
    await assert.rejects(
      daemons.open({ url }),
      expired ? failsWith('peer_untrusted') : failsWith('peer_unreachable', 'no_such_purpose'),
    );
  }
});

test('HTTP goes to HTTP, with ALPN and without, and a purpose that does not exist goes nowhere', async () => {
  await using daemons = await fakeDaemons();
  for (const ALPNProtocols of [['http/1.1'], undefined]) {
    const { port, fleet } = daemons;
    const socket = connect({
      port,
      host: '127.0.0.1',
      ca: fleet.ca,
      ALPNProtocols,
      checkServerIdentity: () => undefined,
    });
    socket.write('GET / HTTP/1.0\r\n\r\n');
    assert.match(String(Buffer.concat(await socket.toArray())), /200 OK[\s\S]*http$/);
  }
  const tls = await daemons.fleet.issue('a');
  await assert.rejects(rawClient(daemons, tls, 'viper-other/1'), /no application protocol/i);
  await nothingIsLeft(daemons);
});

test('after the link has closed, the port is HTTP alone', async () => {
  await using daemons = await fakeDaemons();
  const { client } = await daemons.pair();
  const failed = once(client, 'error');
  await daemons.link.close();
  assert.equal((await failed)[0].code, 'interrupted');
  await client.gone;
});

test('garbage, a frame out of place, and silence instead of HELLO end the connection', async () => {
  await using daemons = await fakeDaemons({ limits: { ...quick, helloTimeoutMs: 300 } });
  const tls = await daemons.fleet.issue('a');
  for (const first of [randomBytes(100).fill(0, 0, 1), Buffer.from('GET / HTTP/1.1\r\n\r\n'), undefined]) {
    using client = await rawClient(daemons, tls);
    if (first) client.send(first);
    await daemons.until(() => client.closed, 'the server hangs up');
  }
  using client = await rawClient(daemons, tls);
  client.send({ type: 'ping', token: 1 });
  assert.equal(((await client.next('refuse')) as { reason: string }).reason, 'protocol');
  await daemons.until(() => client.closed, 'the server hangs up');
  await nothingIsLeft(daemons);
});

test('a session is resumed only by its owner, for its purpose, with its secret, and by a newer HELLO', async () => {
  await using daemons = await fakeDaemons();
  const tls = await daemons.fleet.issue('a');
  const hello = helloOf({ attempt: 5 });
  using owner = await rawClient(daemons, tls);
  owner.send(hello);
  await owner.next('welcome');
  const session = await daemons.accepted();
  const resume: HelloFrame = { ...hello, kind: 'resume', attempt: 6 };
  const intruders: [LinkCredentials, string, HelloFrame, string][] = [
    [await daemons.fleet.issue('c'), 'viper-memory/1', resume, 'unknown_session'],
    [tls, 'viper-disk/1', resume, 'unknown_session'],
    [tls, 'viper-memory/1', { ...resume, secret: randomBytes(32) }, 'unknown_session'],
    [tls, 'viper-memory/1', { ...resume, sessionId: randomBytes(16).toString('hex') }, 'unknown_session'],
    [tls, 'viper-memory/1', { ...resume, attempt: 5 }, 'stale'],
    [tls, 'viper-memory/1', { ...hello, attempt: 4 }, 'stale'],
  ];
  for (const [credentials, alpn, frame, reason] of intruders) {
    using intruder = await rawClient(daemons, credentials, alpn);
    intruder.send(frame);
    assert.equal(((await intruder.next('refuse')) as { reason: string }).reason, reason);
    assert.equal(session.stats.reconnects, 0);
  }
  // The owner's own connection was not touched by any of them.
  owner.send(dataAt(0, Buffer.from('mine')));
  assert.equal(String((await once(session, 'data'))[0]), 'mine');
  using again = await rawClient(daemons, tls);
  again.send(resume);
  assert.equal(((await again.next('welcome')) as { received: number }).received, 4);
  await daemons.until(() => owner.closed, 'the old connection is replaced');
  await session.abandon();
  using late = await rawClient(daemons, tls);
  late.send({ ...resume, attempt: 7 });
  assert.equal(((await late.next('refuse')) as { reason: string }).reason, 'unknown_session');
  late.socket.destroy();
  await nothingIsLeft(daemons);
});

test('a client that breaks the protocol in a session is told so, and the session ends', async () => {
  await using daemons = await fakeDaemons();
  const tls = await daemons.fleet.issue('a');
  const wrong: [string, Buffer][] = [
    ['beyond_window', dataAt(0, Buffer.alloc(200_000)).subarray(0)],
    ['gap', dataAt(1, Buffer.from('x'))],
    ['gap', encodeFrame({ type: 'end', offset: 1 })],
    ['ack_beyond_sent', encodeFrame({ type: 'ack', received: 1, limit: 1 })],
    ['no place', encodeFrame({ type: 'welcome', received: 0, limit: 0 })],
    ['before the session is', encodeFrame({ type: 'done' })],
  ];
  for (const [why, bytes] of wrong) {
    using client = await rawClient(daemons, tls);
    client.send(helloOf());
    await client.next('welcome');
    const session = await daemons.accepted();
    const failed = once(session, 'error');
    const times = why === 'beyond_window' ? 3 : 1;
    session.pause();
    for (let time = 0; time < times; time += 1)
      client.send(time === 0 ? bytes : dataAt(200_000 * time, Buffer.alloc(200_000)));
    const [error] = await failed;
    failsWith('peer_unreachable', 'protocol')(error);
    assert.ok(error.message.includes(why), error.message);
    await client.next('reset');
    client.send({ type: 'done' });
    await session.gone;
  }
  await nothingIsLeft(daemons);
});

test('bytes that are no frame end the session at both sides', async () => {
  await using daemons = await fakeDaemons({ limits: { ...quick, giveUpMs: 500 } });
  using client = await rawClient(daemons, await daemons.fleet.issue('a'));
  client.send(helloOf());
  await client.next('welcome');
  const session = await daemons.accepted();
  const failed = once(session, 'error');
  client.send(Buffer.alloc(50, 0xff));
  failsWith('peer_unreachable', 'protocol')((await failed)[0]);
  await session.gone;
  await nothingIsLeft(daemons);
});

test('what accept throws reaches the client: an AppError as it is, a bug without its words', async () => {
  const failures = [new AppError('forbidden', 'The ticket was used before'), new Error('secret detail')];
  await using daemons = await fakeDaemons({
    accept: async () => {
      throw failures.shift();
    },
  });
  await assert.rejects(daemons.open(), (error) => {
    assert.match((error as Error).message, /used before/);
    return failsWith('forbidden', 'rejected')(error);
  });
  await assert.rejects(daemons.open(), (error) => {
    assert.doesNotMatch((error as Error).message, /secret detail/);
    return failsWith('internal', 'rejected')(error);
  });
  await nothingIsLeft(daemons);
});

test('a session is judged once, although its client is cut off and comes back meanwhile', async () => {
  const judged = Promise.withResolvers<void>();
  let judgements = 0;
  let accepted = 0;
  await using daemons = await fakeDaemons({
    accept: async () => {
      judgements += 1;
      await judged.promise;
      return {
        onSession: (session) => {
          accepted += 1;
          session.on('error', () => {});
        },
      };
    },
  });
  const opening = daemons.open();
  await daemons.until(() => judgements === 1, 'the session is being judged');
  daemons.path.cut();
  await daemons.until(
    () => daemons.path.takenCount === 2 && daemons.path.openCount === 1,
    'the client is back',
  );
  judged.resolve();
  await opening;
  assert.deepEqual([judgements, accepted], [1, 1]);
});

test('sessions and connections are bounded', async () => {
  await using daemons = await fakeDaemons({ maxSessions: 3, maxSessionsPerPeer: 2, maxReceptions: 2 });
  await daemons.open();
  await daemons.open();
  await assert.rejects(daemons.open(), failsWith('too_many'));
  const other = await daemons.fleet.issue('c');
  await daemons.open({ tls: other });
  await assert.rejects(daemons.open({ tls: other }), failsWith('too_many'));
  await daemons.until(() => daemons.link.receptionCount === 0, 'the refused have hung up');
  const tls = await daemons.fleet.issue('a');
  using first = await rawClient(daemons, tls);
  using second = await rawClient(daemons, tls);
  using third = await rawClient(daemons, tls);
  await daemons.until(() => third.closed, 'the third is closed at once');
  assert.deepEqual([first.closed, second.closed], [false, false]);
});

test('opening fails by name: nobody there, cancelled, or asked for nonsense', async () => {
  await using daemons = await fakeDaemons();
  daemons.path.close();
  const limits = { ...quick, openTimeoutMs: 200 };
  await assert.rejects(daemons.open({ limits }), failsWith('peer_unreachable', 'gave_up'));
  const abort = new AbortController();
  const opening = daemons.open({ signal: abort.signal });
  const taken = daemons.path.takenCount;
  await daemons.until(() => daemons.path.takenCount > taken, 'it tries');
  abort.abort();
  await assert.rejects(opening, failsWith('cancelled'));
  await assert.rejects(daemons.open({ signal: AbortSignal.abort() }), failsWith('cancelled'));
  await assert.rejects(daemons.open({ url: 'http://127.0.0.1:1' }), failsWith('invalid_request'));
  await assert.rejects(daemons.open({ hello: { text: 'x'.repeat(9000) } }), failsWith('invalid_request'));
});

test('both ends know what the session is and who is at the other end', async () => {
  await using daemons = await fakeDaemons();
  const { client, server } = await daemons.pair({ purpose: 'viper-disk/1', hello: { disk: 'root' } });
  assert.deepEqual(
    [client.id, client.purpose, client.cloudletId, client.hello],
    [server.id, 'viper-disk/1', 'b', { disk: 'root' }],
  );
  assert.deepEqual(
    [server.purpose, server.cloudletId, server.hello],
    ['viper-disk/1', 'a', { disk: 'root' }],
  );
});
