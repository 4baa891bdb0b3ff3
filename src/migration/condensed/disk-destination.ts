/**
 * Stands at the destination between the link and QEMU's export of the disk, to which it is an NBD client. One frame
 * after the other: what a batch refers to in the disk itself is what all frames before have written.
 */
import type { Duplex } from 'node:stream';
import type { NbdClient } from '../../nbd/index.ts';
import {
  type BlockReader,
  type BoundedReader,
  blockBytes,
  boundedReader,
  runsOf,
  type SetName,
} from '../../pages/index.ts';
import { encodeNumbers, parseDiskHello, parseNumbers, parseRagged, parseZeroes } from './disk-frames.ts';
import { framesOf } from './frame-stream.ts';
import { agentError, encodeFrame, encodeJson, frame, protocolVersion } from './frames.ts';
import { openSet, type PageRun, Rebuilder, unpack } from './rebuilder.ts';

export interface DiskDestinationOptions {
  /** The export; it stays the caller's. */
  disk: NbdClient;
  link: Duplex;
  /** Reference sets that this cloudlet holds. */
  sets: readonly SetName[];
  /** They are the agent's to dispose of. */
  openReader: (name: SetName) => Promise<BlockReader | undefined>;
}

/** The disk itself is late only with a host that is; then everything is. */
const ownDiskTimeoutMs = 60_000;

/** Resolves when the source has ended its side. Whatever breaks it, the link is destroyed. */
export async function takeDisk(options: DiskDestinationOptions): Promise<void> {
  const { disk, link, sets } = options;
  const { sizeBytes } = disk;
  await using readers = new AsyncDisposableStack();
  try {
    link.write(encodeJson(frame.diskOffer, { version: protocolVersion, sizeBytes, sets }));
    let rebuilder: Rebuilder | undefined;
    let batches = 0;
    for await (const { type, body } of framesOf(link)) {
      if (type === frame.hello && !rebuilder)
        rebuilder = await begin(options, parseDiskHello(body).sets, readers);
      else if (!rebuilder) throw agentError(`a frame of type ${type} before its hello`);
      else if (type === frame.batch) {
        const { runs, missed, lost } = await rebuilder.rebuild(await unpack(body));
        await Promise.all(runs.map((run) => write(disk, run)));
        if (lost.length > 0) link.write(encodeFrame(frame.lost, Buffer.from(lost)));
        link.write(encodeNumbers(frame.diskTaken, [batches, ...missed]));
        batches = (batches + 1) % 2 ** 32;
      } else if (type === frame.diskBytes) {
        const { offset, bytes } = parseRagged(body, sizeBytes);
        await disk.write(offset, bytes);
      } else if (type === frame.diskZeroes) {
        const { offset, lengthBytes, isTrim } = parseZeroes(body, sizeBytes);
        await (isTrim ? disk.trim(offset, lengthBytes) : disk.writeZeroes(offset, lengthBytes));
      } else if (type === frame.diskFlush) {
        const [number] = parseNumbers(body);
        await disk.flush();
        link.write(encodeNumbers(frame.diskFlushed, [number]));
      } else throw agentError(`a frame of type ${type} out of place`);
    }
    link.end();
  } catch (error) {
    link.destroy();
    throw error;
  }
}

async function begin(
  { disk, sets, openReader }: DiskDestinationOptions,
  chosen: readonly SetName[],
  readers: AsyncDisposableStack,
): Promise<Rebuilder> {
  const opened: BoundedReader[] = [];
  for (const name of chosen) {
    if (!sets.includes(name)) throw agentError(`a set that was not offered: ${name}`);
    opened.push(readers.use(await openSet(name, openReader)));
  }
  const pages = Math.floor(disk.sizeBytes / blockBytes);
  return new Rebuilder({
    pages,
    sets: [...opened, boundedReader(diskReader(disk), ownDiskTimeoutMs)],
    memory: undefined,
  });
}

/** What was mirrored so far, for this disk's own batches and for memory's. */
export function diskReader(disk: NbdClient): BlockReader {
  const blockCount = Math.floor(disk.sizeBytes / blockBytes);
  return {
    blockCount,
    read: async (blocks) => {
      const pieces = await Promise.all(
        runsOf(blocks, blockCount).map(({ block, count }) =>
          disk.read(block * blockBytes, count * blockBytes),
        ),
      );
      return Buffer.concat(pieces);
    },
    async [Symbol.asyncDispose]() {},
  };
}

async function write(disk: NbdClient, { page, count, content }: PageRun): Promise<void> {
  const offset = page * blockBytes;
  if (content) await disk.write(offset, content);
  else await disk.writeZeroes(offset, count * blockBytes);
}
