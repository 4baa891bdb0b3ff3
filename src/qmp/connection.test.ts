import assert from 'node:assert/strict';
import { once } from 'node:events';
import { type Duplex, duplexPair } from 'node:stream';
import { test } from 'node:test';
import fc from 'fast-check';
import { AppError } from '../model/errors.ts';
import { QmpConnection } from './connection.ts';
import { JsonLineDecoder, type JsonObject } from './lines.ts';

const greeting = {
  QMP: { version: { qemu: { major: 7, minor: 2, micro: 0 }, package: 'Debian' }, capabilities: [] },
};

/** The far end of a connection, played by the test: it answers what `answer` says, or nothing. */
class FakeMonitor {
  readonly near: Duplex;
  readonly far: Duplex;
  readonly received: JsonObject[] = [];

  constructor(answer: (command: JsonObject) => object | undefined) {
    [this.near, this.far] = duplexPair();
    const decoder = new JsonLineDecoder(1e6);
    this.far.on('error', () => {});
    this.far.on('data', (bytes: Buffer) => {
      for (const message of decoder.push(bytes).messages) {
        this.received.push(message);
        const reply = message.execute === 'qmp_capabilities' ? { return: {} } : answer(message);
        if (reply) this.say({ id: message.id, ...reply });
      }
    });
  }

  say(message: object): void {
    this.far.write(`${JSON.stringify(message)}\r\n`);
  }

  async connect(): Promise<QmpConnection> {
    this.say(greeting);
    return QmpConnection.over(this.near);
  }
}

const silent = () => undefined;
const withCode =
  (code: string, details: Record<string, unknown> = {}) =>
  (error: unknown) => {
    assert.ok(error instanceof AppError, String(error));
    assert.equal(error.code, code);
    for (const [key, value] of Object.entries(details)) assert.deepEqual(error.details[key], value);
    return true;
  };

test('it greets, negotiates and runs commands with ids of its own', async () => {
  const monitor = new FakeMonitor(() => ({ return: { running: false, status: 'prelaunch' } }));
  await using qmp = await monitor.connect();
  assert.deepEqual(qmp.version, { major: 7, minor: 2, micro: 0, package: 'Debian' });
  assert.deepEqual(await qmp.execute('query-status'), { running: false, status: 'prelaunch' });
  assert.deepEqual(monitor.received, [
    { execute: 'qmp_capabilities', arguments: { enable: ['oob'] }, id: 1 },
    { execute: 'query-status', id: 2 },
  ]);
});

test('a command goes past a main loop that is stuck', async () => {
  const monitor = new FakeMonitor((message) => ('exec-oob' in message ? { return: {} } : undefined));
  await using qmp = await monitor.connect();
  const stuck = qmp.execute('query-status');
  stuck.catch(() => {});
  await qmp.executeOutOfBand('migrate-recover', { uri: 'unix:/run/recover' });
  assert.deepEqual(monitor.received.at(-1), {
    'exec-oob': 'migrate-recover',
    arguments: { uri: 'unix:/run/recover' },
    id: 3,
  });
});

test('replies find their commands in whatever order they come', async () => {
  const monitor = new FakeMonitor(silent);
  await using qmp = await monitor.connect();
  const first = qmp.execute('query-uuid');
  const second = qmp.execute('query-name');
  monitor.say({ return: { name: 'two' }, id: 3 });
  monitor.say({ return: { UUID: 'one' }, id: 2 });
  assert.deepEqual(await Promise.all([first, second]), [{ UUID: 'one' }, { name: 'two' }]);
});

test('a refusal by QEMU tells the command and the class of the error', async () => {
  const monitor = new FakeMonitor(() => ({ error: { class: 'GenericError', desc: 'no such thing' } }));
  await using qmp = await monitor.connect();
  await assert.rejects(
    qmp.execute('device_del', { id: 'x' }),
    withCode('qemu_failed', { command: 'device_del', qmpClass: 'GenericError', output: 'no such thing' }),
  );
  assert.equal(qmp.state, 'ready');
});

test('a command that is not answered times out, and its late reply is ignored', async () => {
  const monitor = new FakeMonitor(silent);
  await using qmp = await monitor.connect();
  await assert.rejects(
    qmp.execute('stop', undefined, { timeoutMs: 5 }),
    withCode('timeout', { waitedFor: 'stop' }),
  );
  monitor.say({ return: {}, id: 2 });
  monitor.say({ return: {}, id: 'somebody else' });
  const reply = qmp.execute('query-uuid');
  monitor.say({ return: { UUID: 'u' }, id: 3 });
  assert.deepEqual(await reply, { UUID: 'u' });
  assert.equal(qmp.ignoredReplies, 2);
});

test('an abort ends a command with its reason, before or after it was sent', async () => {
  const monitor = new FakeMonitor(silent);
  await using qmp = await monitor.connect();
  const abort = new AbortController();
  const running = qmp.execute('stop', undefined, { signal: abort.signal });
  while (monitor.received.length < 2) await once(monitor.far, 'data');
  abort.abort(new AppError('interrupted', 'The daemon stops'));
  await assert.rejects(running, withCode('interrupted'));
  await assert.rejects(
    qmp.execute('cont', undefined, { signal: AbortSignal.abort() }),
    withCode('cancelled'),
  );
  assert.deepEqual(
    monitor.received.map(({ execute }) => execute),
    ['qmp_capabilities', 'stop'],
  );
});

test('a disconnect rejects every waiter and ends every stream of events', async () => {
  const monitor = new FakeMonitor(silent);
  const qmp = await monitor.connect();
  const waiters = [
    qmp.execute('stop'),
    qmp.execute('cont'),
    qmp.waitForEvent('STOP', () => true),
    qmp.events().next(),
  ];
  monitor.far.end();
  const settled = await Promise.allSettled(waiters);
  assert.deepEqual(
    settled.map((result) => result.status),
    ['rejected', 'rejected', 'rejected', 'fulfilled'],
  );
  assert.equal((await qmp.closed).details.reason, 'disconnected');
  await assert.rejects(qmp.execute('stop'), withCode('qemu_failed'));
});

test('events come in order through a loop and through listeners', async () => {
  const monitor = new FakeMonitor(silent);
  const qmp = await monitor.connect();
  const heard: string[] = [];
  const unsubscribe = qmp.onEvent((event) => heard.push(event.name));
  const events = qmp.events();
  const shutdown = qmp.waitForEvent('SHUTDOWN', ({ guest }) => guest);
  monitor.say({ event: 'STOP', timestamp: { seconds: 1, microseconds: 500_999 } });
  monitor.say({ event: 'SHUTDOWN', data: { guest: true, reason: 'guest-shutdown' } });
  assert.deepEqual(await shutdown, { guest: true, reason: 'guest-shutdown' });
  unsubscribe();
  monitor.say({ event: 'RESUME' });
  monitor.far.end();
  const names: string[] = [];
  for await (const event of events) {
    names.push(event.name);
    if (event.name === 'STOP') assert.equal(event.timestampMs, 1500);
  }
  assert.deepEqual(names, ['STOP', 'SHUTDOWN', 'RESUME']);
  assert.deepEqual(heard, ['STOP', 'SHUTDOWN']);
});

test('a reader of events that falls behind gets an error, not a gap', async () => {
  const monitor = new FakeMonitor(() => ({ return: { UUID: '' } }));
  await using qmp = await monitor.connect();
  const events = qmp.events({ limit: 2 });
  for (let i = 0; i < 3; i += 1) monitor.say({ event: 'STOP' });
  await qmp.execute('query-uuid');
  await assert.rejects(events.next(), withCode('too_many'));
});

test('a server that never greets, or never negotiates, is a timeout and the stream is destroyed', async () => {
  for (const greets of [false, true]) {
    const [near, far] = duplexPair();
    if (greets) far.write(`${JSON.stringify(greeting)}\n`);
    far.resume();
    await assert.rejects(QmpConnection.over(near, { timeoutMs: 5 }), withCode('timeout'));
    assert.ok(near.destroyed);
  }
});

test('a socket that nobody listens on is a failure of QEMU', async () => {
  await assert.rejects(QmpConnection.connect('/nonexistent/qmp.sock'), withCode('qemu_failed'));
});

test('whatever is not QMP closes the connection and rejects the waiter', async () => {
  const garbage = [
    'nonsense\n',
    '{"neither":1}\n',
    '{"error":"text"}\n',
    '[]\n',
    `${JSON.stringify(greeting)}\n`,
  ];
  for (const text of garbage) {
    const monitor = new FakeMonitor(silent);
    const qmp = await monitor.connect();
    const waiter = qmp.execute('stop');
    monitor.far.write(text);
    await assert.rejects(waiter, withCode('qemu_failed', { command: 'stop' }));
    assert.equal((await qmp.closed).details.reason, 'malformed');
  }
});

test('a line without end is refused at the bound', async () => {
  const monitor = new FakeMonitor(silent);
  const qmp = await monitor.connect();
  const chunk = Buffer.alloc(1024 * 1024, 'x');
  while (qmp.state !== 'closed')
    if (!monitor.far.write(chunk)) await Promise.race([once(monitor.far, 'drain'), qmp.closed]);
  assert.match((await qmp.closed).message, /too_long/);
});

test('a reply before the greeting is refused', async () => {
  const [near, far] = duplexPair();
  far.write('{"return":{},"id":1}\n');
  await assert.rejects(QmpConnection.over(near), withCode('qemu_failed', { reason: 'malformed' }));
});

test('random bytes in random pieces never crash it and always settle the waiter', async () => {
  const seed = Number(process.env.SEED ?? Date.now() % 2 ** 31);
  console.log(`fuzz seed ${seed} (repeat with SEED=${seed})`);
  const piece = fc.oneof(
    fc.uint8Array({ maxLength: 40 }).map((bytes) => Buffer.from(bytes)),
    fc.jsonValue().map((value) => Buffer.from(`${JSON.stringify(value)}\n`)),
    fc
      .constantFrom('return', 'error', 'event', 'QMP')
      .chain((key) =>
        fc.jsonValue().map((value) => Buffer.from(`${JSON.stringify({ [key]: value, id: 2 })}\n`)),
      ),
  );
  await fc.assert(
    fc.asyncProperty(fc.array(piece), async (pieces) => {
      const monitor = new FakeMonitor(silent);
      const qmp = await monitor.connect();
      const waiter = qmp.execute('stop');
      for (const bytes of pieces) monitor.far.write(bytes);
      monitor.far.end();
      await Promise.allSettled([waiter]);
      await qmp.closed;
    }),
    { seed, numRuns: 200 },
  );
});
