import assert from 'node:assert/strict';
import { mkdtemp, rm } from 'node:fs/promises';
import { createServer, type Server, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type TestContext, test } from 'node:test';
import fc from 'fast-check';
import { MiB } from '../model/units.ts';
import { JsonLineDecoder, type JsonObject } from '../qmp/index.ts';
import { GuestAgent } from './agent.ts';

type Answer = (request: JsonObject, socket: Socket) => unknown;

const sync: Answer = (request, socket) => {
  const { id } = request.arguments as { id: number };
  socket.write(Buffer.concat([Buffer.of(0xff), Buffer.from(`{"return":${id}}\n`)]));
};

/** A guest agent played by the test; `answers` say what it does with each request. */
async function fakeAgent(t: TestContext, answers: Record<string, Answer>) {
  const directory = await mkdtemp(join(tmpdir(), 'viper-agent-'));
  const path = join(directory, 'agent.sock');
  const requests: JsonObject[] = [];
  const sockets = new Set<Socket>();
  const server: Server = createServer((socket) => {
    sockets.add(socket);
    socket.on('error', () => {});
    const decoder = new JsonLineDecoder(MiB);
    socket.on('data', (bytes: Buffer) => {
      // The sentinel before a sync is what ends an unfinished request; a fake needs no more than to drop it.
      for (const request of decoder.push(bytes.filter((byte) => byte !== 0xff)).messages) {
        requests.push(request);
        const answer = { 'guest-sync-delimited': sync, ...answers }[String(request.execute)];
        const reply = answer?.(request, socket);
        if (reply !== undefined) socket.write(`${JSON.stringify(reply)}\n`);
      }
    });
  });
  await new Promise<void>((resolve) => server.listen(path, resolve));
  const agent = new GuestAgent(path);
  t.after(async () => {
    agent.close();
    for (const socket of sockets) socket.destroy();
    server.close();
    await rm(directory, { recursive: true });
  });
  return { agent, requests, connections: () => sockets.size };
}

const ok: Answer = () => ({ return: {} });

test('it synchronises once and then sends one request after the other', async (t) => {
  const { agent, requests, connections } = await fakeAgent(t, { 'guest-ping': ok });
  await Promise.all([agent.ping(), agent.ping(), agent.ping()]);
  assert.deepEqual(
    requests.map(({ execute }) => execute),
    ['guest-sync-delimited', 'guest-ping', 'guest-ping', 'guest-ping'],
  );
  assert.equal(connections(), 1);
});

test('late replies and an older sync before our own are thrown away', async (t) => {
  const { agent } = await fakeAgent(t, {
    'guest-ping': ok,
    'guest-sync-delimited': (request, socket) => {
      socket.write(Buffer.from('"late":true}\n{"return":{"pid":1}}\n\u00ff{"return":7}\n', 'latin1'));
      sync(request, socket);
    },
  });
  await agent.ping();
});

test('the sync reply may come one byte at a time', async (t) => {
  const { agent } = await fakeAgent(t, {
    'guest-ping': ok,
    'guest-sync-delimited': (request, socket) => {
      const { id } = request.arguments as { id: number };
      socket.setNoDelay(true);
      const bytes = [...Buffer.from(`x{"return":${id}}\n`)];
      bytes[0] = 0xff;
      const next = () => {
        const byte = bytes.shift();
        if (byte !== undefined) socket.write(Buffer.of(byte), () => setImmediate(next));
      };
      next();
    },
  });
  await agent.ping();
});

test('silence is an error, and the next request starts anew', async (t) => {
  let deaf = true;
  const { agent, connections } = await fakeAgent(t, {
    'guest-ping': () => (deaf ? undefined : { return: {} }),
  });
  await assert.rejects(agent.ping({ timeoutMs: 20 }), { code: 'agent_unavailable' });
  deaf = false;
  await agent.ping();
  assert.equal(connections(), 2);
});

test('a request that is aborted while it waits does not let the next one overtake', async (t) => {
  const { agent } = await fakeAgent(t, { 'guest-ping': () => undefined, 'guest-get-host-name': ok });
  const first = agent.ping({ timeoutMs: 50 });
  const abort = new AbortController();
  const second = agent.ping({ signal: abort.signal });
  const third = agent.facts();
  abort.abort();
  await assert.rejects(second, { code: 'cancelled' });
  await assert.rejects(first, { code: 'agent_unavailable' });
  third.catch(() => {});
});

test('no socket at all is an agent that is not there', async () => {
  await assert.rejects(new GuestAgent('/nonexistent/agent.sock').ping(), { code: 'agent_unavailable' });
});

test('garbage, floods, and words unasked for are errors and never more', async (t) => {
  const cases: Answer[] = [
    () => [],
    () => ({ neither: true }),
    (_, socket) => void socket.write('nonsense\n'),
    (_, socket) => void socket.write(Buffer.alloc(5 * MiB, 'x')),
    (_, socket) => void socket.write('{"error":{"class":1}}\n{"return":{}}\n'),
    (_, socket) => void socket.end(),
  ];
  for (const answer of cases) {
    const { agent } = await fakeAgent(t, { 'guest-fsfreeze-thaw': answer, 'guest-ping': ok });
    await assert.rejects(agent.fsThaw(), (error: { code: string }) =>
      ['agent_unavailable', 'unsupported'].includes(error.code),
    );
    await agent.ping();
  }
});

test('facts are what makes sense in the replies, and the rest is left out', async (t) => {
  const { agent } = await fakeAgent(t, {
    'guest-get-host-name': () => ({ return: { 'host-name': 'one' } }),
    'guest-get-osinfo': () => ({ error: { class: 'CommandNotFound', desc: 'no' } }),
    'guest-network-get-interfaces': () => ({
      return: [
        {
          name: 'eth0',
          'hardware-address': '02:AA:00:00:00:01',
          'ip-addresses': [{ 'ip-address': '10.0.2.15', prefix: 24 }, { prefix: 'x' }, null],
        },
        { name: 7 },
        'eth1',
      ],
    }),
  });
  assert.deepEqual(await agent.facts(), {
    hostname: 'one',
    interfaces: [
      { name: 'eth0', mac: '02:aa:00:00:00:01', addresses: [{ address: '10.0.2.15', prefixLength: 24 }] },
    ],
  });
});

test('exec waits for the end of the program and decodes its output', async (t) => {
  const replies = [
    { exited: false },
    { exited: true, exitcode: 3, 'out-data': 'aGk=', 'err-truncated': true },
  ];
  const { agent, requests } = await fakeAgent(t, {
    'guest-exec': () => ({ return: { pid: 12 } }),
    'guest-exec-status': () => ({ return: replies.shift() }),
  });
  const result = await agent.exec({ argv: ['/bin/cat', '-'], input: 'hi', timeoutMs: 5000 });
  assert.deepEqual(result, { exitCode: 3, stdout: 'hi', stderr: '', truncated: true });
  assert.deepEqual(requests[1]!.arguments, {
    path: '/bin/cat',
    arg: ['-'],
    'capture-output': true,
    'input-data': 'aGk=',
  });
});

test('a program that is not there ends with 127, as in a shell', async (t) => {
  const { agent } = await fakeAgent(t, {
    'guest-exec': () => ({ error: { class: 'GenericError', desc: 'No such file' } }),
  });
  assert.deepEqual(await agent.exec({ argv: ['/none'], timeoutMs: 5000 }), {
    exitCode: 127,
    stdout: '',
    stderr: 'No such file\n',
    truncated: false,
  });
});

test('a program that does not end in time is killed in the guest', async (t) => {
  const killed = Promise.withResolvers<unknown>();
  const { agent } = await fakeAgent(t, {
    'guest-exec': (request) => {
      const { path, arg } = request.arguments as { path: string; arg: string[] };
      if (path === '/bin/kill') killed.resolve(arg);
      return { return: { pid: 99 } };
    },
    'guest-exec-status': () => ({ return: { exited: false } }),
  });
  await assert.rejects(agent.exec({ argv: ['/bin/sleep', '60'], timeoutMs: 20 }), { code: 'timeout' });
  assert.deepEqual(await killed.promise, ['-9', '99']);
});

test('waiting until ready outlasts refusals and ends with the timeout', async (t) => {
  let attempts = 0;
  const { agent } = await fakeAgent(t, {
    'guest-ping': (_, socket) => {
      attempts += 1;
      if (attempts >= 2) return { return: {} };
      socket.end();
      return undefined;
    },
  });
  await agent.waitUntilReady({ timeoutMs: 30_000 });
  assert.equal(attempts, 2);
  await assert.rejects(new GuestAgent('/nonexistent').waitUntilReady({ timeoutMs: 1 }), {
    code: 'agent_unavailable',
  });
});

test('whatever bytes the guest answers with, the request settles', async (t) => {
  const seed = Number(process.env.SEED ?? Date.now() % 2 ** 31);
  console.log(`fuzz seed ${seed} (repeat with SEED=${seed})`);
  let bytes: Uint8Array = new Uint8Array();
  const { agent } = await fakeAgent(t, { 'guest-ping': (_, socket) => void socket.end(bytes) });
  await fc.assert(
    fc.asyncProperty(fc.uint8Array({ maxLength: 100 }), async (some) => {
      bytes = some;
      await Promise.allSettled([agent.ping()]);
    }),
    { seed, numRuns: 50 },
  );
});
