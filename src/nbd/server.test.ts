import assert from 'node:assert/strict';
import { mkdtemp, readdir, rm } from 'node:fs/promises';
import { createConnection, createServer } from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { after, before, test } from 'node:test';
import { AppError } from '../model/errors.ts';
import { connectNbd } from './client.ts';
import { MemoryBackend } from './memory-backend.ts';
import { NbdError } from './protocol.ts';
import { type Backend, serveNbd } from './server.ts';

let directory = '';
let socket = '';

before(async () => {
  directory = await mkdtemp(path.join(tmpdir(), 'viper-nbd-'));
  socket = path.join(directory, 'nbd.sock');
});
after(() => rm(directory, { recursive: true }));

const serve = (backend: Backend, onDisconnect?: (error: Error | undefined) => void) =>
  serveNbd({ path: socket, exportName: 'disk', backend, ...(onDisconnect && { onDisconnect }) });
const connect = () => connectNbd({ path: socket, exportName: 'disk' });

test('a client reads what it has written, zeroed and trimmed, many commands at a time', async () => {
  const backend = new MemoryBackend(1_000_000);
  await using _server = await serve(backend);
  await using client = await connect();
  assert.equal(client.sizeBytes, 1_000_000);
  const pieces = Array.from({ length: 100 }, (_, i) => Buffer.alloc(7000, i + 1));
  await Promise.all(pieces.map((piece, i) => client.write(i * 7000, piece)));
  await client.writeZeroes(7000, 7000);
  await client.trim(21_000, 7000);
  await client.flush();
  const read = await Promise.all(pieces.map((_, i) => client.read(i * 7000, 7000)));
  read.forEach((piece, i) => {
    assert.ok(piece.equals(i === 1 || i === 3 ? Buffer.alloc(7000) : pieces[i]!), `piece ${i}`);
  });
  assert.deepEqual(backend.done.slice(-3), ['writeZeroes', 'trim', 'flush']);
  const extents = await client.extents(6656, 14_848);
  assert.deepEqual(extents, [
    { lengthBytes: 512, flags: 0 },
    { lengthBytes: 6656, flags: 3 },
    { lengthBytes: 7680, flags: 0 },
  ]);
});

test('what the backend refuses reaches the client by its code, and the connection goes on', async () => {
  class Full extends MemoryBackend {
    override async write(): Promise<void> {
      throw new AppError('insufficient_space', 'the disk is full');
    }
    override async writeZeroes(): Promise<void> {
      throw new NbdError('ENOTSUP', 'not fast');
    }
    override async trim(): Promise<void> {
      throw new Error('something else');
    }
  }
  await using _server = await serve(new Full(10_000));
  await using client = await connect();
  await assert.rejects(client.write(0, Buffer.alloc(10)), { nbdCode: 'ENOSPC', message: /the disk is full/ });
  await assert.rejects(client.writeZeroes(0, 10), { nbdCode: 'ENOTSUP' });
  await assert.rejects(client.trim(0, 10), { nbdCode: 'EIO' });
  await assert.rejects(client.read(9_999, 2), { nbdCode: 'EINVAL' });
  await assert.rejects(client.write(9_999, Buffer.alloc(2)), { nbdCode: 'ENOSPC' });
  assert.equal((await client.read(0, 10_000)).length, 10_000);
});

test('nothing is written to an export that is read-only', async () => {
  const backend = Object.assign(new MemoryBackend(1000), { isReadOnly: true });
  await using _server = await serve(backend);
  await using client = await connect();
  await assert.rejects(client.write(0, Buffer.alloc(10, 1)), { nbdCode: 'EPERM' });
  assert.deepEqual(backend.done, []);
});

test('a second client is turned away while one is there, and may come when it has left', async () => {
  const left = Promise.withResolvers<Error | undefined>();
  await using _server = await serve(new MemoryBackend(1000), left.resolve);
  {
    await using _first = await connect();
    await assert.rejects(connect(), { code: 'peer_unreachable' });
  }
  assert.equal(await left.promise, undefined);
  await using second = await connect();
  assert.equal((await second.read(0, 4)).length, 4);
});

test('a client that speaks something else is cut off with the reason, and the server lives on', async () => {
  const gone = Promise.withResolvers<Error | undefined>();
  await using _server = await serve(new MemoryBackend(1000), gone.resolve);
  createConnection({ path: socket })
    .on('error', () => {})
    .end('GET / HTTP/1.1\r\n\r\n');
  assert.match(String((await gone.promise)?.message), /Read NBD: client flags/);
  await using client = await connect();
  assert.equal(client.sizeBytes, 1000);
});

test('calls that wait when the server goes fail, and none waits for ever', async () => {
  class Stuck extends MemoryBackend {
    override read(): Promise<Buffer> {
      return new Promise(() => {});
    }
  }
  const server = await serve(new Stuck(100_000));
  await using client = await connect();
  const calls = Array.from({ length: 40 }, (_, i) => client.read(i, 1));
  const outcomes = Promise.allSettled(calls);
  await server[Symbol.asyncDispose]();
  for (const outcome of await outcomes) {
    assert.equal(outcome.status, 'rejected');
    assert.equal(outcome.reason.code, 'peer_unreachable');
  }
  await assert.rejects(client.flush(), { code: 'peer_unreachable' });
  assert.deepEqual(await readdir(directory), []);
  await assert.rejects(connect(), { code: 'peer_unreachable' });
});

test('a server that falls silent in the negotiation costs the client its patience and no more', async () => {
  const silent = createServer(() => {}).listen(socket);
  try {
    await assert.rejects(connectNbd({ path: socket, exportName: 'disk', timeoutMs: 50 }), {
      code: 'timeout',
    });
    const signal = AbortSignal.abort();
    await assert.rejects(connectNbd({ path: socket, exportName: 'disk', signal }), { code: 'cancelled' });
  } finally {
    silent.close();
  }
});
