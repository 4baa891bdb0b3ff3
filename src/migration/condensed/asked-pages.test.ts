import assert from 'node:assert/strict';
import { randomFillSync } from 'node:crypto';
import { test } from 'node:test';
import { zstdCompressSync } from 'node:zlib';
import { readBatch } from './batch.ts';
import { framesOf } from './frame-stream.ts';
import { encodeFrame, encodeJson, encodeWord, frame, protocolVersion } from './frames.ts';
import { PageSet } from './page-set.ts';
import { unpack } from './rebuilder.ts';
import { SourceAgent } from './source-agent.ts';
import { FakeRam, linkPair } from './stand-ins.ts';
import { noStatistics } from './statistics.ts';

const pages = 4000;

test('a page that is asked for goes by itself, then what lies behind it, and pushing goes on from there', async () => {
  const ram = new FakeRam(pages);
  randomFillSync(ram.bytes);
  const [near, far] = linkPair();
  const agent = new SourceAgent({
    qemu: undefined,
    link: near,
    memory: ram,
    mode: 'resume',
    openIndex: async () => undefined,
    limitBps: () => undefined,
    statistics: noStatistics(),
  });
  const run = agent.run();
  far.write(encodeJson(frame.offer, { version: protocolVersion, sets: [], reads: true }));
  const missing = new PageSet(pages);
  missing.addRange(0, pages);
  const asked = 3000;
  const batches: [number, number][] = [];
  for await (const { type, body } of framesOf(far)) {
    if (type === frame.blocks) far.write(encodeFrame(frame.missing, zstdCompressSync(missing.toBytes())));
    if (type !== frame.batch) continue;
    const runs = readBatch((await unpack(body)).bytes, pages);
    batches.push([runs[0]!.page, runs.reduce((sum, { count }) => sum + count, 0)]);
    if (batches.length === 1) far.write(encodeFrame(frame.want, Buffer.of(0), encodeWord(asked)));
    if (batches.at(-1)![0] > asked + 1) break;
  }
  const at = batches.findIndex(([first]) => first === asked);
  assert.deepEqual(batches.slice(at, at + 2), [
    [asked, 1],
    [asked + 1, 15],
  ]);
  assert.equal(batches[at + 2]![0], asked + 16);
  far.end();
  far.resume();
  await run;
});
