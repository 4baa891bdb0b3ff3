/** Sessions joined with real unix sockets, as QEMU's are, over a path that fails. */
import assert from 'node:assert/strict';
import { createHash, randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { createConnection, createServer, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { PassThrough } from 'node:stream';
import { test } from 'node:test';
import { MiB } from '../model/units.ts';
import { fakeDaemons } from './fake-daemons.ts';
import { readInto } from './read-into.ts';

/** A socket that a server has accepted and nobody reads, and the one that connected to it. */
async function socketPair(): Promise<{ accepted: Socket; connected: Socket } & AsyncDisposable> {
  const directory = await mkdtemp(path.join(tmpdir(), 'viper-joint-'));
  const file = path.join(directory, 'socket');
  const server = createServer({ allowHalfOpen: true, pauseOnConnect: true });
  await once(server.listen(file), 'listening');
  const connected = createConnection({ path: file, allowHalfOpen: true });
  const [accepted] = (await once(server, 'connection')) as [Socket];
  for (const socket of [accepted, connected]) socket.on('error', () => {});
  return {
    accepted,
    connected,
    async [Symbol.asyncDispose]() {
      for (const socket of [accepted, connected]) socket.destroy();
      server.close();
      await rm(directory, { recursive: true, force: true });
    },
  };
}

/** Writes so many random bytes in pieces of many sizes, and ends; the digest of what was written. */
async function pour(socket: Socket, totalBytes: number): Promise<string> {
  const hash = createHash('sha256');
  for (let left = totalBytes, size = 1; left > 0; size = (size * 7 + 3) % 300_000) {
    const bytes = randomBytes(Math.min(left, size + 1));
    left -= bytes.length;
    hash.update(bytes);
    if (!socket.write(bytes)) await once(socket, 'drain');
  }
  socket.end();
  return hash.digest('hex');
}

async function digestOf(socket: Socket, onBytes: (total: number) => void = () => {}): Promise<string> {
  const hash = createHash('sha256');
  let total = 0;
  for await (const bytes of socket.iterator({ destroyOnReturn: false })) {
    hash.update(bytes);
    total += bytes.length;
    onBytes(total);
  }
  return hash.digest('hex');
}

test('two sockets are one stream both ways over a path that is cut again and again', async () => {
  await using daemons = await fakeDaemons();
  await using near = await socketPair();
  await using far = await socketPair();
  const { client, server } = await daemons.pair();
  const joined = [client.carry(near.accepted), server.carry(far.accepted)];
  let next = MiB;
  const onBytes = (total: number) => {
    if (total < next) return;
    next += 3 * MiB;
    daemons.path.cutAfter(1 + (next % 50_000));
  };
  const [forth, back, atFar, atNear] = await Promise.all([
    pour(near.connected, 12 * MiB),
    pour(far.connected, 3 * MiB),
    digestOf(far.connected, onBytes),
    digestOf(near.connected),
  ]);
  assert.equal(atFar, forth);
  assert.equal(atNear, back);
  await Promise.all(joined);
  await Promise.all([client.gone, server.gone]);
  assert.ok(client.stats.reconnects >= 2, `${client.stats.reconnects} reconnects`);
});

test('the end of one direction leaves the other open', async () => {
  await using daemons = await fakeDaemons();
  await using near = await socketPair();
  await using far = await socketPair();
  const { client, server } = await daemons.pair();
  const joined = [client.carry(near.accepted), server.carry(far.accepted)];
  near.connected.end('question');
  assert.equal(String(Buffer.concat(await far.connected.toArray())), 'question');
  far.connected.end('answer');
  assert.equal(String(Buffer.concat(await near.connected.toArray())), 'answer');
  await Promise.all(joined);
});

test('a socket that nobody reads holds the sender up, and no more than the window lies in between', async () => {
  await using daemons = await fakeDaemons();
  await using near = await socketPair();
  await using far = await socketPair();
  const { client, server } = await daemons.pair();
  const joined = [client.carry(near.accepted), server.carry(far.accepted)];
  far.connected.pause();
  const poured = pour(near.connected, 40 * MiB);
  await daemons.until(
    () => client.stats.unacknowledgedBytes === 0 && server.stats.receivedBytes > 0,
    'the sender stands still',
  );
  const kernelBytes = 4 * MiB;
  assert.ok(server.stats.receivedBytes <= server.stats.windowBytes + kernelBytes);
  assert.equal(await digestOf(far.connected), await poured);
  far.connected.end();
  near.connected.resume();
  await Promise.all(joined);
});

test('a socket or a session that breaks ends the joint, and neither passes for the end of the stream', async () => {
  await using daemons = await fakeDaemons();
  for (const broken of ['socket', 'session'] as const) {
    await using near = await socketPair();
    await using far = await socketPair();
    const { client, server } = await daemons.pair();
    const joined = client.carry(near.accepted);
    const other = server.carry(far.accepted);
    near.connected.write('begun');
    await once(far.connected, 'readable');
    if (broken === 'socket') near.accepted.destroy();
    else client.destroy(new Error('it broke'));
    await assert.rejects(joined);
    client.destroy();
    await assert.rejects(other);
    assert.equal(far.accepted.writableEnded, false);
  }
});

test('an accepted socket is read into memory of ours', async () => {
  await using pair = await socketPair();
  const buffer = new Uint8Array(8);
  const seen: string[] = [];
  const paused = Promise.withResolvers<void>();
  const isDirect = readInto(
    pair.accepted,
    () => buffer,
    (bytes) => {
      assert.equal(bytes.buffer, buffer.buffer);
      seen.push(String(Buffer.from(bytes)));
      if (seen.length !== 2) return true;
      paused.resolve();
      return false;
    },
  );
  // If a new Node makes this false, everything still works but slowly.
  assert.ok(isDirect);
  pair.connected.end('0123456789abcdefXYZ');
  await paused.promise;
  assert.deepEqual(seen, ['01234567', '89abcdef']);
  pair.accepted.resume();
  await once(pair.accepted, 'end');
  assert.deepEqual(seen, ['01234567', '89abcdef', 'XYZ']);
});

test('a stream without that gives the same bytes', async () => {
  const stream = new PassThrough();
  const buffer = new Uint8Array(8);
  let seen = '';
  stream.write('before ');
  const isDirect = readInto(
    stream as unknown as Socket,
    () => buffer,
    (bytes) => {
      seen += String(Buffer.from(bytes));
      return true;
    },
  );
  assert.equal(isDirect, false);
  stream.end('and afterwards');
  await once(stream, 'end');
  assert.equal(seen, 'before and afterwards');
});

test('what was awaited of a session before it is joined goes to the socket first', async () => {
  await using daemons = await fakeDaemons();
  await using near = await socketPair();
  await using far = await socketPair();
  const { client, server } = await daemons.pair();
  const joined = [server.carry(far.accepted)];
  const poured = pour(far.connected, MiB);
  await once(client, 'readable');
  for (let bytes = client.read(); bytes !== null; bytes = client.read()) near.accepted.write(bytes);
  joined.push(client.carry(near.accepted));
  near.connected.end('and back');
  const [sent, taken, back] = await Promise.all([poured, digestOf(near.connected), digestOf(far.connected)]);
  assert.equal(taken, sent);
  assert.equal(back, createHash('sha256').update('and back').digest('hex'));
  await Promise.all(joined);
});
