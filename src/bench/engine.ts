/**
 * `npm run bench:engine`: how fast the condensed engine's agents move pages that are neither zero nor known, from a
 * process that stands for the source's daemon to one that stands for the destination's, over TCP on loopback. QEMU is
 * left out at both ends. `MIB` says how much RAM there is (1024).
 */
import { fork } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { createConnection, createServer, type Socket } from 'node:net';
import { Duplex, Readable } from 'node:stream';
import type { CompressionMode } from '../migration/condensed/compression.ts';
import { DestinationAgent } from '../migration/condensed/destination-agent.ts';
import type { GuestRam } from '../migration/condensed/guest-memory.ts';
import { SourceAgent } from '../migration/condensed/source-agent.ts';
import { noStatistics } from '../migration/condensed/statistics.ts';
import type { EngineStatistics } from '../model/migration.ts';
import { MiB } from '../model/units.ts';
import {
  BlockTable,
  beginSection,
  eof,
  PageWriter,
  pageBytes,
  sectionEnd,
  startSection,
} from '../stream/index.ts';
import { table } from './report.ts';

const memoryMiB = Number(process.env.MIB ?? 1024);
const blocks = new BlockTable([{ name: 'pc.ram', sizeBytes: memoryMiB * MiB }]);
const poolPages = 2048;
const chunkPages = 16;

interface Report {
  ms: number;
  cpuMs: number;
  peakBytes: number;
  statistics?: EngineStatistics;
}

/** A migration stream whose pages all differ. Of each page half is random, and half compresses well. */
function streamOfPages(): Readable {
  const pool = Buffer.alloc(poolPages * pageBytes, 'a page of a guest, as text might be in it; ');
  for (let page = 0; page < poolPages; page += 1) randomBytes(2048).copy(pool, page * pageBytes);
  const writer = new PageWriter(blocks);
  function* pieces(): Generator<Buffer> {
    yield Buffer.from('5145564d00000003', 'hex');
    yield startSection(2, blocks);
    yield beginSection('part', 2);
    for (let page = 0; page < blocks.pages; ) {
      const chunk = Buffer.allocUnsafe(chunkPages * PageWriter.maxBytes);
      let at = 0;
      for (let count = 0; count < chunkPages && page < blocks.pages; count += 1, page += 1) {
        const from = (page % poolPages) * pageBytes;
        pool.writeUInt32LE(page, from);
        at = writer.page(chunk, at, page, pool, from);
      }
      yield chunk.subarray(0, at);
    }
    yield sectionEnd(2);
    yield eof();
    yield Buffer.of(6, 0, 0, 0, 2);
    yield Buffer.from('{}');
  }
  return Readable.from(pieces(), { objectMode: false, highWaterMark: 256 * 1024 });
}

/** Stands for a VM's memory; nothing here is read of it. */
const noRam: GuestRam = {
  table: () => blocks,
  use: () => {},
  read: (_page, count, to, at = 0) => void to.fill(0, at, at + count * pageBytes),
};

class Sink extends Duplex {
  override _read(): void {}

  override _write(_bytes: Buffer, _encoding: BufferEncoding, done: () => void): void {
    setImmediate(done);
  }
}

async function measured(run: () => Promise<void>): Promise<Omit<Report, 'statistics'>> {
  let peakBytes = 0;
  const look = () => {
    peakBytes = Math.max(peakBytes, process.memoryUsage.rss());
  };
  const timer = setInterval(look, 50);
  const startedAt = performance.now();
  const before = process.cpuUsage();
  await run();
  const { user, system } = process.cpuUsage(before);
  look();
  clearInterval(timer);
  return { ms: performance.now() - startedAt, cpuMs: (user + system) / 1000, peakBytes };
}

async function beSource(port: number, compression: CompressionMode): Promise<void> {
  const link = createConnection({ port, host: '127.0.0.1', noDelay: true, allowHalfOpen: true });
  const statistics = noStatistics();
  const agent = new SourceAgent({
    qemu: streamOfPages(),
    link,
    memory: noRam,
    mode: 'precopy',
    openIndex: async () => undefined,
    limitBps: () => undefined,
    compression,
    statistics,
  });
  const report = await measured(() => agent.run());
  process.send!({ ...report, statistics: agent.statistics });
}

async function beDestination(): Promise<void> {
  const server = createServer({ noDelay: true, allowHalfOpen: true }, (link: Socket) => {
    server.close();
    const agent = new DestinationAgent({
      qemu: new Sink(),
      link,
      memory: noRam,
      sets: [],
      openReader: async () => undefined,
    });
    void measured(() => agent.run()).then((report) => process.send!(report));
  });
  server.listen(0, '127.0.0.1', () => {
    const address = server.address();
    process.send!(typeof address === 'object' && address?.port);
  });
}

async function move(compression: CompressionMode): Promise<[Report, Report]> {
  const file = import.meta.filename;
  const destination = fork(file, ['destination']);
  const port = await new Promise<number>((resolve) =>
    destination.once('message', (it) => resolve(Number(it))),
  );
  const came = new Promise<Report>((resolve) => destination.once('message', (it) => resolve(it as Report)));
  const source = fork(file, ['source', String(port), compression]);
  const left = new Promise<Report>((resolve) => source.once('message', (it) => resolve(it as Report)));
  const reports = await Promise.all([left, came]);
  for (const child of [source, destination]) if (child.connected) child.disconnect();
  return reports;
}

const [role, port, compression] = process.argv.slice(2);
if (role === 'source') await beSource(Number(port), compression as CompressionMode);
else if (role === 'destination') await beDestination();
else {
  const rows: string[][] = [];
  for (const compression of ['off', 'adaptive', 'always'] as const) {
    const [source, destination] = await move(compression);
    const mb = (memoryMiB * MiB) / 1e6;
    const { cpuMs, wireBytes } = source.statistics!;
    rows.push([
      compression,
      (mb / (source.ms / 1000)).toFixed(0),
      (wireBytes / 1e6).toFixed(0),
      ((source.cpuMs + destination.cpuMs) / 1000).toFixed(1),
      (source.cpuMs / 1000).toFixed(1),
      (destination.cpuMs / 1000).toFixed(1),
      (cpuMs.digest / 1000).toFixed(1),
      (source.peakBytes / 1e6).toFixed(0),
      (destination.peakBytes / 1e6).toFixed(0),
    ]);
  }
  console.log(`${memoryMiB} MiB of pages that are neither zero nor known; half of each is random.\n`);
  console.log(
    table(
      [
        'compression',
        'MB/s of guest RAM',
        'MB sent',
        'CPU s',
        'of the source',
        'of the destination',
        'for digests',
        'source MB',
        'destination MB',
      ],
      rows,
    ),
  );
}
