/** Real TLS connections over a path that fails in every way: bytes arrive exactly once and in order. */
import assert from 'node:assert/strict';
import { createHash, randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { PassThrough, Readable } from 'node:stream';
import { finished, pipeline } from 'node:stream/promises';
import { test } from 'node:test';
import { AppError } from '../model/errors.ts';
import { KiB, MiB } from '../model/units.ts';
import { fakeDaemons, quick } from './fake-daemons.ts';
import type { Session } from './session.ts';

/** Random bytes in chunks of many sizes, and their digest when all were given. */
function randomStream(totalBytes: number): { stream: Readable; digest: () => string } {
  const hash = createHash('sha256');
  function* chunks() {
    for (let left = totalBytes, size = 1; left > 0; size = (size * 7 + 3) % 90_000) {
      const chunk = randomBytes(Math.min(left, size + 1));
      hash.update(chunk);
      left -= chunk.length;
      yield chunk;
    }
  }
  return { stream: Readable.from(chunks(), { objectMode: false }), digest: () => hash.digest('hex') };
}

async function digestOf(
  stream: AsyncIterable<Buffer>,
  onBytes: (total: number) => void = () => {},
): Promise<string> {
  const hash = createHash('sha256');
  let total = 0;
  for await (const bytes of stream) {
    hash.update(bytes);
    total += bytes.length;
    onBytes(total);
  }
  return hash.digest('hex');
}

/** Moves bytes both ways at once and says whether each arrived as it was sent. */
async function exchange(
  client: Session,
  server: Session,
  totalBytes: number,
  onBytes: (total: number) => void,
) {
  const forth = randomStream(totalBytes);
  const back = randomStream(totalBytes / 4);
  const [, , atServer, atClient] = await Promise.all([
    pipeline(forth.stream, client, { end: true }),
    pipeline(back.stream, server, { end: true }),
    digestOf(server.iterator({ destroyOnReturn: false }) as AsyncIterable<Buffer>, onBytes),
    digestOf(client.iterator({ destroyOnReturn: false }) as AsyncIterable<Buffer>),
  ]);
  assert.equal(atServer, forth.digest());
  assert.equal(atClient, back.digest());
}

test('bytes arrive exactly once and in order over a path that is cut again and again', async () => {
  await using daemons = await fakeDaemons();
  const { client, server } = await daemons.pair();
  let next = 300_000;
  await exchange(client, server, 8 * MiB, (total) => {
    if (total < next) return;
    next += 700_000;
    if (next % 3 === 0) daemons.path.cut();
    else daemons.path.cutAfter(1 + (next % 50_000));
  });
  assert.ok(client.stats.reconnects >= 5, `${client.stats.reconnects} reconnects`);
  assert.equal(server.stats.receivedBytes, 8 * MiB);
  assert.ok(client.stats.resentBytes > 0);
  await Promise.all([client.gone, server.gone]);
  assert.equal(daemons.link.sessions.length, 0);
});

test('a path that freezes without a word is found dead and replaced', async () => {
  await using daemons = await fakeDaemons();
  const { client, server } = await daemons.pair();
  let frozen = 0;
  await exchange(client, server, 4 * MiB, (total) => {
    if (total < (frozen + 1) * MiB || frozen >= 2) return;
    frozen += 1;
    daemons.path.freeze();
    client.once('disconnected', () => daemons.path.thaw());
  });
  assert.equal(frozen, 2);
  assert.ok(client.stats.reconnects >= 2);
});

test('an idle session finds out as well, and goes on afterwards', async () => {
  await using daemons = await fakeDaemons();
  const { client, server } = await daemons.pair();
  daemons.path.freeze();
  const [reason] = await once(client, 'disconnected');
  assert.match(String(reason), /nothing came over it/);
  daemons.path.thaw();
  await once(client, 'connected');
  client.write('still here');
  assert.equal(String((await once(server, 'data'))[0]), 'still here');
});

test('a slow path delays the bytes and nothing else, and its round trip is measured', async () => {
  await using daemons = await fakeDaemons();
  daemons.path.delay(20);
  const { client, server } = await daemons.pair();
  await exchange(client, server, 2 * MiB, () => {});
  assert.ok(client.stats.rttMs! >= 40, `${client.stats.rttMs} ms`);
  assert.ok(client.stats.deliveryRateBps > 0);
  assert.equal(client.stats.resentBytes, 0);
});

test('neither end keeps more than the window while nobody reads, cut or not', async () => {
  const limits = { ...quick, initialWindowBytes: 64 * KiB, maxWindowBytes: 256 * KiB };
  await using daemons = await fakeDaemons({ limits });
  const { client, server } = await daemons.pair({ limits });
  server.pause();
  let written = 0;
  for (let round = 0; round < 3; round += 1) {
    while (client.writableLength < client.writableHighWaterMark) {
      client.write(Buffer.alloc(64 * KiB));
      written += 1;
    }
    await daemons.until(
      () => client.stats.connected && client.stats.unacknowledgedBytes === 0,
      'all is acknowledged',
    );
    assert.ok(server.stats.receivedBytes <= 256 * KiB + server.readableHighWaterMark);
    daemons.path.cut();
    await once(client, 'disconnected');
  }
  let arrived = 0;
  server.on('data', (bytes) => {
    arrived += bytes.length;
  });
  client.end();
  server.resume();
  await once(server, 'end');
  assert.equal(arrived, written * 64 * KiB);
});

test('the end of one direction leaves the other open, through cuts', async () => {
  await using daemons = await fakeDaemons();
  const { client, server } = await daemons.pair();
  client.end('question');
  assert.equal(String((await server.toArray()).join('')), 'question');
  daemons.path.cut();
  await once(client, 'connected');
  server.end('answer');
  assert.equal(String((await client.toArray()).join('')), 'answer');
  await Promise.all([client.gone, server.gone]);
});

test('sessions that end while the path is cut still end well at both sides', async () => {
  for (const allowedBytes of [0, 20, 60, 100, 140, 200]) {
    await using daemons = await fakeDaemons();
    const { client, server } = await daemons.pair();
    server.resume();
    client.resume();
    server.end();
    client.end();
    if (allowedBytes === 0) daemons.path.cut();
    else daemons.path.cutAfter(allowedBytes);
    await Promise.all([finished(client), finished(server), client.gone, server.gone]);
    assert.equal(daemons.link.sessions.length, 0);
  }
});

test('a path that stays cut ends the session with peer_unreachable on both sides', async () => {
  const limits = { ...quick, giveUpMs: 300 };
  await using daemons = await fakeDaemons({ limits });
  const { client, server } = await daemons.pair({ limits });
  const errors = Promise.all([once(client, 'error'), once(server, 'error')]);
  daemons.path.close();
  for (const [error] of await errors) {
    assert.ok(error instanceof AppError);
    assert.equal(error.code, 'peer_unreachable');
    assert.equal(error.details.reason, 'gave_up');
  }
  await Promise.all([client.gone, server.gone]);
  assert.equal(daemons.link.sessions.length, 0);
});

test('a cancelled session is cancelled at the peer too, also when the path was cut at that moment', async () => {
  for (const isCut of [false, true]) {
    await using daemons = await fakeDaemons();
    const abort = new AbortController();
    const { client, server } = await daemons.pair({ signal: abort.signal });
    if (isCut) {
      daemons.path.close();
      await once(client, 'disconnected');
    }
    const failed = once(server, 'error');
    abort.abort(new AppError('cancelled', 'The migration was cancelled'));
    daemons.path.open();
    const [error] = await failed;
    assert.equal(error.code, 'cancelled');
    assert.match(error.message, /The migration was cancelled/);
    await Promise.all([client.gone, server.gone]);
  }
});

test('a reset by the server reaches a client that was cut off', async () => {
  await using daemons = await fakeDaemons();
  const { client, server } = await daemons.pair();
  daemons.path.close();
  await Promise.all([once(client, 'disconnected'), once(server, 'disconnected')]);
  const failed = once(client, 'error');
  server.destroy(new AppError('insufficient_space', 'The disk is full'));
  daemons.path.open();
  const [error] = await failed;
  assert.equal(error.code, 'insufficient_space');
  await Promise.all([client.gone, server.gone]);
});

test('a restarted daemon ends the session at once, by name', async () => {
  await using daemons = await fakeDaemons();
  const { client, server } = await daemons.pair();
  daemons.path.close();
  await once(client, 'disconnected');
  // All that a restart leaves of a session: nothing.
  await server.abandon();
  const failed = once(client, 'error');
  daemons.path.open();
  const [error] = await failed;
  assert.equal(error.code, 'interrupted');
  assert.equal(error.details.reason, 'unknown_session');
  await client.gone;
});

test('a rate limit holds over cuts and can be changed at any time', async () => {
  await using daemons = await fakeDaemons();
  const { client, server } = await daemons.pair();
  client.setRateLimit(8000);
  const sink = server.pipe(new PassThrough());
  sink.resume();
  const sent = pipeline(Readable.from([randomBytes(1 * MiB)]), client, { end: true });
  await daemons.until(() => server.stats.receivedBytes > 0, 'the first bytes arrive');
  daemons.path.cut();
  await once(client, 'connected');
  assert.ok(server.stats.receivedBytes < 100 * KiB);
  client.setRateLimit(null);
  await once(sink, 'end');
  server.end();
  client.resume();
  await sent;
  assert.equal(server.stats.receivedBytes, 1 * MiB);
});
