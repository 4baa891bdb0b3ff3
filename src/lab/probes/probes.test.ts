import assert from 'node:assert/strict';
import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { connect, createServer } from 'node:net';
import path from 'node:path';
import { test } from 'node:test';
import fc from 'fast-check';
import { probeEcho, serveEcho } from './echo.ts';
import { GapMeter } from './gap-meter.ts';
import { SequenceCheck, sequenceBytes } from './sequence.ts';
import { receiveStream, serveStream } from './stream.ts';

test('the sequence is the same in whatever pieces it is made and taken', () => {
  const whole = sequenceBytes(0, 4096);
  assert.deepEqual([...whole.subarray(0, 12)], [0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2]);
  fc.assert(
    fc.property(fc.array(fc.integer({ min: 0, max: 200 }), { maxLength: 20 }), (sizes) => {
      const check = new SequenceCheck();
      let offset = 0;
      for (const size of sizes) {
        const piece = sequenceBytes(offset, size);
        assert.ok(piece.equals(whole.subarray(offset, offset + size)));
        check.push(piece);
        offset += size;
      }
      assert.equal(check.bytes, offset);
    }),
  );
});

test('a byte that is wrong, doubled or left out is found where it is', () => {
  const whole = sequenceBytes(0, 1024);
  const flipped = Buffer.from(whole);
  flipped[777]! ^= 1;
  assert.throws(() => new SequenceCheck().push(flipped), /byte 777 is/);
  const check = new SequenceCheck();
  check.push(whole.subarray(0, 500));
  assert.throws(() => check.push(whole.subarray(501)), /byte 50\d is/);
});

test('the longest silence is found, and the one at the end counts', () => {
  const meter = new GapMeter(100);
  for (const at of [1000, 1010, 1260, 1270]) meter.sign(at);
  assert.deepEqual(meter.longest, { fromMs: 1010, toMs: 1260, ms: 250 });
  meter.end(2270);
  assert.equal(meter.longest?.ms, 1000);
  assert.deepEqual(
    meter.gaps.map(({ ms }) => ms),
    [250, 1000],
  );
});

async function freePort(): Promise<number> {
  const server = createServer().listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = server.address() as { port: number };
  server.close();
  await once(server, 'close');
  return port;
}

for (const protocol of ['udp', 'tcp'] as const)
  test(`echoes over ${protocol} are counted, timed and told`, async () => {
    const stop = new AbortController();
    const to = { host: '127.0.0.1', port: await freePort() };
    await serveEcho(to, stop.signal);
    const end = new AbortController();
    const seen: number[] = [];
    const summary = await probeEcho({
      to,
      protocol,
      intervalMs: 2,
      signal: end.signal,
      onAnswer: ({ sequence }) => {
        seen.push(sequence);
        if (seen.length === 5) end.abort();
      },
    });
    stop.abort();
    assert.deepEqual(seen.slice(0, 5), [0, 1, 2, 3, 4]);
    assert.ok(summary.sent >= 5 && summary.received >= 5 && summary.rttMs!.min >= 0);
    assert.equal(summary.brokenBy, undefined);
  });

test('a stream is verified to its end and its samples add up', async () => {
  const stop = new AbortController();
  const from = { host: '127.0.0.1', port: await freePort() };
  await serveStream(from, stop.signal);
  let sampled = 0;
  const summary = await receiveStream({
    from,
    everyMs: 5,
    maxBytes: 3_000_000,
    signal: stop.signal,
    onSample: ({ bytes }) => {
      sampled += bytes;
    },
  });
  stop.abort();
  assert.ok(summary.verifiedBytes >= 3_000_000);
  assert.equal(sampled, summary.verifiedBytes);
  assert.equal(summary.brokenBy, undefined);
});

const python = spawnSync('python3', ['--version']).status === 0;
test('the servers for guests speak as these do', { skip: python ? false : 'no python3 here' }, async () => {
  const [echoPort, streamPort] = [await freePort(), await freePort()];
  const file = path.join(import.meta.dirname, 'servers.py');
  const server = spawn('python3', [file, String(echoPort), String(streamPort)], {
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  try {
    await once(server.stdout, 'data');
    for (const protocol of ['udp', 'tcp'] as const) {
      const end = new AbortController();
      const { received, brokenBy } = await probeEcho({
        to: { host: '127.0.0.1', port: echoPort },
        protocol,
        intervalMs: 2,
        signal: end.signal,
        onAnswer: ({ sequence }) => {
          if (sequence === 3) end.abort();
        },
      });
      assert.ok(received >= 4 && brokenBy === undefined, protocol);
    }
    const from = { host: '127.0.0.1', port: streamPort };
    const { signal } = new AbortController();
    const summary = await receiveStream({ from, everyMs: 1000, maxBytes: 500_000, signal });
    assert.ok(summary.verifiedBytes >= 500_000 && summary.brokenBy === undefined, summary.brokenBy);
  } finally {
    server.kill();
    await once(server, 'exit');
  }
});

test('a stream that is wrong, or ends too soon, is told as broken', async () => {
  for (const [bytes, why] of [
    [Buffer.from([0, 0, 0, 0, 0, 0, 0, 2]), /byte 7 is 2, wanted 1/],
    [sequenceBytes(0, 100), /closed by the other end/],
  ] as const) {
    const server = createServer((socket) => socket.end(bytes)).listen(0, '127.0.0.1');
    await once(server, 'listening');
    const { port } = server.address() as { port: number };
    const { signal } = new AbortController();
    const summary = await receiveStream({ from: { host: '127.0.0.1', port }, everyMs: 1000, signal });
    assert.match(String(summary.brokenBy), why);
    server.close();
  }
});

test('a server that is told to end lets go of its clients', async () => {
  const stop = new AbortController();
  const port = await freePort();
  await serveStream({ host: '127.0.0.1', port }, stop.signal);
  const client = connect(port, '127.0.0.1').on('error', () => {});
  await once(client, 'data');
  const closed = once(client, 'close');
  stop.abort();
  client.resume();
  await closed;
});
