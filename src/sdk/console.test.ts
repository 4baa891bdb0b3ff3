import assert from 'node:assert/strict';
import type { AddressInfo } from 'node:net';
import { test } from 'node:test';
import websocket from '@fastify/websocket';
import fastify from 'fastify';
import { connect } from './client.ts';
import { fakeCa } from './fake-certificates.ts';
import { refusal } from './fake-daemon.ts';
import { connectNode } from './node.ts';

const ca = await fakeCa();
const server = await ca.issue('edge1');

/** A daemon whose console says hello, echoes, and hangs up at `bye`. */
async function consoleDaemon(vm: { status: number; body: unknown }, https?: { cert: string; key: string }) {
  const app = fastify({ https: https ?? null });
  await app.register(websocket, {
    options: { handleProtocols: (offered: Set<string>) => offered.has('viper.console') && 'viper.console' },
  });
  const offered: (string | undefined)[] = [];
  app.get('/v1/vms/:vm', (_, reply) => reply.status(vm.status).send(vm.body));
  app.get('/v1/vms/web/console', { websocket: true }, (socket, request) => {
    offered.push(request.headers['sec-websocket-protocol']);
    socket.send(Buffer.from('login: '));
    socket.on('message', (data: Buffer) => {
      socket.send(data);
      if (data.toString() === 'bye') socket.close(1000, 'the console has ended');
    });
  });
  await app.listen({ host: '127.0.0.1', port: 0 });
  const { port } = app.server.address() as AddressInfo;
  return {
    url: `${https ? 'https' : 'http'}://127.0.0.1:${port}`,
    offered,
    [Symbol.asyncDispose]: () => app.close(),
  };
}

const running = { status: 200, body: { state: 'running', allowedActions: ['stop'] } };
const params = { vm: 'web' };

async function readAll(
  readable: ReadableStream<Uint8Array>,
  onText: (text: string) => void,
): Promise<string> {
  let text = '';
  const decoder = new TextDecoder();
  for (const reader = readable.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) return text;
    text += decoder.decode(value, { stream: true });
    onText(text);
  }
}

test('a console carries bytes both ways until the VM hangs up', async () => {
  await using daemon = await consoleDaemon(running);
  const session = await connect({ url: daemon.url, token: 'secret' }).attachConsole({ params });
  const writer = session.writable.getWriter();
  let asked = false;
  const text = await readAll(session.readable, () => {
    if (!asked) void writer.write(new TextEncoder().encode('bye'));
    asked = true;
  });
  assert.equal(text, 'login: bye');
  assert.deepEqual(await session.closed, { code: 1000, reason: 'the console has ended' });
  assert.deepEqual(daemon.offered, ['viper.console, bearer.secret']);
  await assert.rejects(writer.write(new Uint8Array(1)), /has ended/);
});

test('a console in Node goes over TLS pinned to the CA; disposing detaches', async () => {
  await using daemon = await consoleDaemon(running, { cert: server.certificate, key: server.key });
  await using viper = connectNode({ url: daemon.url, ca: ca.certificate });
  {
    await using session = await viper.attachConsole({ params });
    const { value } = await session.readable.getReader().read();
    assert.equal(new TextDecoder().decode(value), 'login: ');
  }
  await using stranger = connectNode({ url: daemon.url, ca: (await fakeCa()).certificate });
  await assert.rejects(stranger.attachConsole({ params }), { code: 'unreachable' });
  assert.equal(daemon.offered.length, 1);
});

test('a console that does not open tells why', async () => {
  await using gone = await consoleDaemon({ status: 404, body: refusal('not_found', "There is no VM 'x'") });
  await assert.rejects(connect({ url: gone.url }).attachConsole({ params: { vm: 'x' } }), {
    code: 'not_found',
  });
  const body = { state: 'stopped', allowedActions: ['start', 'delete'] };
  await using stopped = await consoleDaemon({ status: 200, body });
  await assert.rejects(connect({ url: stopped.url }).attachConsole({ params: { vm: 'x' } }), {
    code: 'wrong_state',
    message: "Cannot attach to the console of VM 'x': it is stopped. Start it first.",
    details: { state: 'stopped', allowed: ['start', 'delete'] },
  });
  await using other = await consoleDaemon(running);
  await assert.rejects(
    connect({ url: other.url }).attachConsole({ params: { vm: 'x' } }),
    /did not open the console/,
  );
});

test('an abort ends the console', async () => {
  await using daemon = await consoleDaemon(running);
  const stop = new AbortController();
  const session = await connect({ url: daemon.url }).attachConsole({ params, signal: stop.signal });
  stop.abort();
  assert.equal((await session.closed).code, 1000);
});
