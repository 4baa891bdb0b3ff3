import assert from 'node:assert/strict';
import { mkdtemp, rm } from 'node:fs/promises';
import { createServer, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type TestContext, test } from 'node:test';
import { Console, type ConsoleSession } from './console.ts';

/** A serial port that echoes what is typed. */
async function fakePort(t: TestContext) {
  const directory = await mkdtemp(join(tmpdir(), 'viper-console-'));
  const path = join(directory, 'console.sock');
  const sockets: Socket[] = [];
  const server = createServer((socket) => {
    sockets.push(socket);
    socket.on('error', () => {});
    socket.pipe(socket);
  });
  await new Promise<void>((resolve) => server.listen(path, resolve));
  const port = new Console(path);
  t.after(async () => {
    port.close();
    for (const socket of sockets) socket.destroy();
    server.close();
    await rm(directory, { recursive: true });
  });
  return { port, sockets };
}

/** Reads until the text was seen, and gives everything up to it. */
async function readUntil(session: ConsoleSession, text: string): Promise<string> {
  let seen = '';
  for await (const bytes of session) {
    seen += bytes.toString();
    if (seen.includes(text)) break;
  }
  return seen;
}

test('every session sees the output, over one connection', async (t) => {
  const { port, sockets } = await fakePort(t);
  const [one, two] = [port.attach(), port.attach()];
  one.write('hello\n');
  assert.deepEqual(await Promise.all([readUntil(one, '\n'), readUntil(two, '\n')]), ['hello\n', 'hello\n']);
  assert.equal(sockets.length, 1);
});

test('after the last session has gone a new one connects again', async (t) => {
  const { port, sockets } = await fakePort(t);
  for (const text of ['one\n', 'two\n']) {
    const session = port.attach();
    session.write(text);
    assert.equal(await readUntil(session, '\n'), text);
  }
  assert.equal(sockets.length, 2);
});

test('a slow reader loses the oldest output and is told how much', async (t) => {
  const { port, sockets } = await fakePort(t);
  const [slow, fast] = [port.attach(), port.attach()];
  fast.write('hello\n');
  await readUntil(port.attach(), 'hello\n');
  const sent = `${'x'.repeat(1024 * 1024)}END`;
  sockets[0]!.write(sent);
  await readUntil(fast, 'END');
  const seen = await readUntil(slow, 'END');
  const lost = /^\r\n\[(\d+) bytes of output were lost here\]\r\n/.exec(seen);
  assert.ok(lost, seen.slice(0, 80));
  assert.equal(seen.length - lost[0].length + Number(lost[1]), 'hello\n'.length + sent.length);
  assert.ok(seen.length < 300 * 1024);
});

test('closing ends a loop that waits, and refuses to write', async (t) => {
  const { port } = await fakePort(t);
  const session = port.attach();
  const reading = readUntil(session, 'never');
  session.close();
  assert.equal(await reading, '');
  assert.throws(() => session.write('x'), { code: 'wrong_state' });
});

test('a guest that does not read holds up nobody for ever', async (t) => {
  const { port } = await fakePort(t);
  const session = port.attach();
  assert.throws(
    () => {
      for (let i = 0; i < 1000; i += 1) session.write('x'.repeat(1024));
    },
    { code: 'too_many' },
  );
});

test('a port that is not there ends the session', async () => {
  const session = new Console('/nonexistent/console.sock').attach();
  assert.equal(await readUntil(session, 'never'), '');
});
