/**
 * `npm run bench:pages [--records N] [--image FILE]`: what reference sets cost. Rates of the digests to choose from,
 * in CPU time; building an index of real content; look-ups of contents that are there and of such that are not, with
 * an index held whole in memory and one of which the records are read from the file (5.2 million records are an image of 20 GB without a
 * zero); the memory that each takes.
 */
import crypto from 'node:crypto';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { guestImage } from '../lab/guests.ts';
import { formatBytes, MiB } from '../model/units.ts';
import {
  buildIndex,
  contentReader,
  contentSource,
  digestBlocks,
  digestBytes,
  digestOf,
  noBlock,
  openIndex,
} from '../pages/index.ts';
import { IndexWriter } from '../pages/index-writer.ts';
import { openDiskContent } from '../vm/disk-content.ts';
import { table } from './report.ts';

const { values } = parseArgs({ options: { records: { type: 'string' }, image: { type: 'string' } } });
const recordCount = Number(values.records ?? 5_200_000);
const imageFile = values.image ?? guestImage('debian');
const batch = 256;
const directory = await mkdtemp(path.join(tmpdir(), 'viper-bench-pages-'));
const file = path.join(directory, 'index');
const { signal } = new AbortController();

const cpuMs = (): number => {
  const { user, system } = process.cpuUsage();
  return (user + system) / 1000;
};
const perSecond = (count: number, ms: number): string => `${((count / ms) * 1000).toFixed(0)}/s`;
const rate = (bytes: number, ms: number): string => `${(bytes / ms / 1000).toFixed(0)} MB/s`;

function measureDigests(): string {
  const bytes = crypto.randomBytes(32 * MiB);
  const pieces = (size: number) =>
    Array.from({ length: bytes.length / size }, (_, i) => bytes.subarray(i * size, (i + 1) * size));
  const cpuRate = (size: number, digest: (piece: Buffer) => unknown): string => {
    let best = Number.POSITIVE_INFINITY;
    for (let turn = 0; turn < 5; turn += 1) {
      const before = cpuMs();
      for (const piece of pieces(size)) digest(piece);
      best = Math.min(best, cpuMs() - before);
    }
    return rate(bytes.length, best);
  };
  const node = ['sha256', 'sha512-256', 'blake2b512'].map((name) => ({
    name: `${name} (node:crypto)`,
    digest: (piece: Buffer): unknown => crypto.hash(name, piece, 'buffer'),
  }));
  const all = [{ name: 'BLAKE3, in use', digest: digestOf as (piece: Buffer) => unknown }, ...node];
  const rows = all.map(({ name, digest }) => [name, cpuRate(4096, digest), cpuRate(MiB, digest)]);
  return table(['digest, of one CPU', '4 KiB pages', '1 MiB batches'], rows);
}

interface LookUps {
  known: string;
  unknown: string;
  heldBytes: number;
}

/** Batches of look-ups for about two seconds each. */
async function measureLookUps(known: Buffer, wholeUpToBytes: number): Promise<LookUps> {
  await using index = await openIndex(file, { wholeUpToBytes });
  const run = async (digests: Buffer, areKnown: boolean): Promise<string> => {
    const batchBytes = batch * digestBytes;
    let done = 0;
    const began = performance.now();
    for (let at = 0; performance.now() - began < 2000; at += batchBytes) {
      if (at + batchBytes > digests.length) at = 0;
      const found = await index.lookup(digests.subarray(at, at + batchBytes));
      if (found.some((block) => (block === noBlock) === areKnown)) throw new Error('a look-up is wrong');
      done += batch;
    }
    return perSecond(done, performance.now() - began);
  };
  const result = {
    known: await run(known, true),
    unknown: await run(crypto.randomBytes(known.length), false),
  };
  return { ...result, heldBytes: index.heldBytes };
}

async function benchImage(): Promise<string> {
  await using content = await openDiskContent(imageFile, 'qcow2');
  const source = contentSource(content);
  const [beganMs, beganCpuMs] = [performance.now(), cpuMs()];
  const facts = await buildIndex({ file, name: 'image:bench', stamp: '', source, signal });
  const [tookMs, tookCpuMs] = [performance.now() - beganMs, cpuMs() - beganCpuMs];
  // The digests of a part of the disk as a guest's page cache would have them.
  const digests: Buffer[] = [];
  const numbers: number[] = [];
  for await (const { first, bytes } of source.pieces(signal)) {
    digests.push(digestBlocks(bytes));
    for (let i = 0; i < bytes.length / 4096; i += 1) numbers.push(first + i);
    if (numbers.length > 20_000) break;
  }
  const read = await measureReads(numbers);
  await using index = await openIndex(file);
  const found = await index.lookup(Buffer.concat(digests));
  return [
    `image of ${formatBytes(content.virtualBytes)}: ${facts.records} distinct blocks, index ${formatBytes(facts.fileBytes)}`,
    `built in ${(tookMs / 1000).toFixed(1)} s (${(tookCpuMs / 1000).toFixed(1)} s CPU), ${rate(facts.records * 4096, tookMs)}`,
    `of its own first ${numbers.length} blocks ${found.filter((block) => block !== noBlock).length} are found (the rest is zero)`,
    `reads by number: in order ${read.inOrder}, at random ${read.atRandom}`,
  ].join('\n');
}

async function measureReads(numbers: number[]): Promise<{ inOrder: string; atRandom: string }> {
  await using reader = contentReader(await openDiskContent(imageFile, 'qcow2'));
  const run = async (order: number[]): Promise<string> => {
    const began = performance.now();
    for (let at = 0; at < order.length; at += batch)
      await reader.read(Uint32Array.from(order.slice(at, at + batch)));
    return rate(order.length * 4096, performance.now() - began);
  };
  const shuffled = numbers
    .map((number) => ({ number, key: Math.random() }))
    .toSorted((a, b) => a.key - b.key);
  return { inOrder: await run(numbers), atRandom: await run(shuffled.map(({ number }) => number)) };
}

async function benchLarge(): Promise<string> {
  const rssBefore = process.memoryUsage().rss;
  const known: Buffer[] = [];
  const began = performance.now();
  let mostRss = 0;
  using writer = new IndexWriter({ file, name: 'image:large', stamp: '', blockCount: recordCount });
  for (let block = 0; block < recordCount; ) {
    const digests = crypto.randomBytes(Math.min(4096, recordCount - block) * digestBytes);
    for (let at = 0; at < digests.length; at += digestBytes)
      writer.addDigest(block++, digests.subarray(at, at + digestBytes));
    if (Math.random() < 0.1) known.push(digests);
    mostRss = Math.max(mostRss, process.memoryUsage().rss);
  }
  const facts = writer.finish();
  mostRss = Math.max(mostRss, process.memoryUsage().rss);
  const sortMs = performance.now() - began;
  // A guest's pages come in no order that the index knows.
  const asked = Buffer.concat(known);
  const rows: string[][] = [];
  for (const isWhole of [true, false]) {
    const {
      known: hits,
      unknown,
      heldBytes,
    } = await measureLookUps(asked, isWhole ? Number.POSITIVE_INFINITY : 0);
    rows.push([isWhole ? 'in memory' : 'in the file', hits, unknown, formatBytes(heldBytes)]);
  }
  return [
    `${facts.records} records, index ${formatBytes(facts.fileBytes)}: sorted and written in ${(sortMs / 1000).toFixed(1)} s, ` +
      `${formatBytes(Math.max(0, mostRss - rssBefore))} of memory over the start`,
    '',
    table(['records', 'known', 'unknown', 'held'], rows),
  ].join('\n');
}

try {
  console.log(`${measureDigests()}\n`);
  console.log(`${await benchImage()}\n`);
  console.log(await benchLarge());
} finally {
  await rm(directory, { recursive: true });
}
